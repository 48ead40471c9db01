"""Memory of gathered layers on a device that is behind the host, which CPUs are not: a fake one, counted in bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from qvtune.distributed.fake_ranks import fake_ranks
from qvtune.model.layers import decoder_layers, layer_sizes
from qvtune.model.run_ahead import LAYERS_AHEAD
from tests.support.fake_engine import run_of, small_batch, small_model, start_engine

NUM_LAYERS, NUM_RANKS = 12, 2


class Stream:
    """Of a device; ``position``: how much of the computation it has to wait for."""

    def __init__(self, device: "LateDevice") -> None:
        self.device, self.position = device, 0

    def wait_stream(self, other: "Stream") -> None:
        self.position = max(self.position, other.position)

    def synchronize(self) -> None:
        self.device.finish(self.position)


class LateDevice(CPU_Accelerator):
    """It gathers at once, and computes nothing before the host waits for it.

    What the host has released while the device had still to compute with it is ``pinned``: (position, bytes).
    """

    def __init__(self) -> None:
        super().__init__()
        self.compute = self.current = Stream(self)
        self.pinned: list[tuple[int, int]] = []
        self.most = 0

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    @property
    def Stream(self) -> Any:
        return lambda: Stream(self)

    @property
    def Event(self) -> Any:
        return lambda: Event(self)

    def current_stream(self, device_index: int | None = None) -> Stream:
        return self.current

    default_stream = current_stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """``Tensor.record_stream``: the host has released a tensor that this stream uses."""
        if stream is self.compute:
            stream.position += 1
            self.pinned.append((stream.position, tensor.nbytes))
            self.most = max(self.most, sum(size for _, size in self.pinned))

    def finish(self, position: int) -> None:
        """The host waits until the device has got there."""
        self.pinned = [(other, size) for other, size in self.pinned if other > position]


class Event:
    """A place in the current stream."""

    def __init__(self, device: LateDevice) -> None:
        self.device, self.position = device, 0

    def record(self, stream: Stream | None = None) -> None:
        self.position = (stream or self.device.current).position

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.device.finish(self.position)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_device_that_is_late_holds_a_few_layers(checkpointing: bool) -> None:
    """Without ``limit_run_ahead`` it holds all of them."""
    device, dtype = LateDevice(), torch.float32
    run = run_of(NUM_RANKS, activation_checkpointing=checkpointing)
    sizes = small_model(run, 1, dtype, None)
    layer = layer_sizes(sizes).gathered_numel * dtype.itemsize
    embedding = sizes.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    with (
        fake_ranks(NUM_RANKS),
        patch.object(real_accelerator, "ds_accelerator", device),
        patch.object(torch.Tensor, "record_stream", lambda tensor, stream: device.record(tensor, stream)),
    ):
        engine = start_engine(run, NUM_LAYERS, NUM_RANKS, dtype)
        assert len(decoder_layers(engine.module)) == NUM_LAYERS
        for _ in range(3):
            device.finish(device.compute.position)
            device.most = 0
            engine.backward(engine(small_batch()))
            # Embedding and head are not counted as layers; the head runs in forward and in backward.
            assert layer <= device.most <= (LAYERS_AHEAD + 1) * layer + 3 * embedding
            engine.step()
