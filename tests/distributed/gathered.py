"""A job of tests/distributed/worker.py: whether DeepSpeed gives NF4 layers the bytes that were stored."""

import gc
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from qvtune.config.deepspeed import LayerSizes, fill_from_model, resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Whole, ZeroPartition

# The codes of a layer are 65,541 elements in bfloat16, which is more than there are patterns of 16 bits, and 32,771 in
# float32, of which two layers have more. Both numbers are odd: the second rank has padding.
HIDDEN, INTERMEDIATE = 84, 3121
NUM_LAYERS = 3
NUM_STEPS = 3  # DeepSpeed records the order of the modules in the first steps, and prefetches from the third on
COMPARISONS = 2 * NUM_STEPS + 2  # of each layer


def bit_patterns(numel: int, dtype: torch.dtype, layer: int) -> torch.Tensor:
    """``numel`` elements whose first 16 bits count up from layer to layer; the other 16 of float32 vary, or are zero.

    Among them are both zeros, denormal numbers, infinities, and NaN of both signs, quiet and signalling, with many
    payloads.
    """
    high = torch.arange(layer * numel, (layer + 1) * numel) % 2**16
    if dtype == torch.bfloat16:
        return high.to(torch.uint16).view(dtype)
    low = torch.where(high % 3 == 0, 0, high * 40503 % 2**16)
    return (high * 2**16 + low).to(torch.uint32).view(dtype)


class CheckedLinear(NF4Linear):
    """An NF4 layer that compares the bytes it is given with those stored, in forward and in backward."""

    def __init__(self, layer: int, dtype: torch.dtype, placement: Whole | ZeroPartition) -> None:
        super().__init__(HIDDEN, INTERMEDIATE, bias=False, double_quant=True, dtype=dtype)
        self.stored = {name: bit_patterns(size, dtype, layer) for name, size in self.layout.piece_numel().items()}
        self.comparisons, self.different = 0, set[str]()
        shard = placement.shard
        for name, piece in self.stored.items():
            numel = shard.numel(piece.numel())
            padded = torch.zeros(numel * shard.num_ranks * dtype.itemsize, dtype=torch.uint8)
            padded[: piece.nbytes] = piece.view(torch.uint8)
            own = padded.view(dtype)[shard.rank * numel :][:numel].clone()
            self.register_parameter(name, placement.parameter(tuple(piece.shape), own))

    def compare(self) -> None:
        """Note the pieces that differ in any bit."""
        self.comparisons += 1
        for name, piece in self.stored.items():
            found = getattr(self, name).data
            if found.dtype != piece.dtype or not torch.equal(found.view(torch.uint8), piece.view(torch.uint8)):
                self.different.add(name)

    def matrix(self) -> torch.Tensor:
        """Weights without NaN, so that there is something to train."""
        self.compare()
        return torch.full(self.layout.shape, 1e-2, dtype=self.layout.storage)


class Layer(nn.Module):
    """An NF4 layer and what is trained."""

    def __init__(self, number: int, dtype: torch.dtype, placement: Whole | ZeroPartition) -> None:
        super().__init__()
        self.frozen = CheckedLinear(number, dtype, placement)
        self.adapter = nn.Linear(INTERMEDIATE, HIDDEN, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, HIDDEN] -> [B, HIDDEN]."""
        output: torch.Tensor = hidden_states + self.adapter(self.frozen(hidden_states))
        return output


def gathered(folder: str, cases: Sequence[dict[str, Any]], bypassing: dict[str, Any]) -> dict[str, Any]:
    """Train under each DeepSpeed configuration of ``cases`` in each dtype; the pieces that were not those stored.

    ``bypassing`` is one more, whose section zero_optimization gets these keys after it has been resolved.
    """
    gc.freeze()  # DeepSpeed collects garbage at each start: a second, with everything that has been imported
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        resolved = [_resolve(Path(folder), case, dtype) for case in (*cases, cases[0])]
        resolved[-1]["zero_optimization"] |= bypassing
        found[dtype] = [_different_pieces(config, getattr(torch, dtype)) for config in resolved]
    return found


def _resolve(folder: Path, case: dict[str, Any], dtype: str) -> dict[str, Any]:
    file = folder / f"deepspeed-{process_group.rank()}.json"
    file.write_text(json.dumps(case))
    train = {"max_steps": 1, "global_batch_size": process_group.world_size()}
    run = RunConfig.model_validate({"run_dir": str(folder), "deepspeed": str(file), "train": train})
    layers = LayerSizes(("Layer",), gathered_numel=HIDDEN * INTERMEDIATE, persistent_numel=0)
    return fill_from_model(resolve_deepspeed(run, process_group.world_size(), dtype), layers)


def _different_pieces(config: dict[str, Any], dtype: torch.dtype) -> list[str]:
    import deepspeed
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import groups

    sharded = config["zero_optimization"]["stage"] == 3
    with (
        # DeepSpeed keeps the groups of hpZ, and refuses to make them twice in a process.
        patch.object(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None),
        # Set by its launcher. With fewer ranks per node zero_quantized_gradients needs a kernel that CPUs do not have.
        patch.dict(os.environ, LOCAL_SIZE=str(process_group.world_size())),
    ):
        placement = ZeroPartition(config, dtype) if sharded else Whole(process_group.device())
        model = nn.Sequential(*(Layer(number, dtype, placement) for number in range(NUM_LAYERS)))
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        for _ in range(NUM_STEPS):
            hidden_states = torch.ones(
                1, HIDDEN, dtype=dtype, requires_grad=True
            )  # else no backward of the first layer
            engine.backward(engine(hidden_states).float().square().mean())
            engine.step()
        if sharded:
            engine.empty_partition_cache()
        layers = [layer.frozen for layer in model]
        for layer in layers:
            parameters = list(layer.parameters())
            for together in (parameters,), parameters:
                with ExitStack() as stack:
                    for one_or_all in together:
                        stack.enter_context(GatheredParameters(one_or_all))
                    layer.compare()
        engine.destroy()
    assert [layer.comparisons for layer in layers] == [COMPARISONS] * NUM_LAYERS
    return [f"{number}.{name}" for number, layer in enumerate(layers) for name in sorted(layer.different)]
