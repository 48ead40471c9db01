"""Keeps the host from running ahead of the device under ZeRO-3, which costs the memory of every layer it is ahead."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn

from qvtune.model.layer_hooks import is_recomputed

LAYERS_AHEAD = 2


def limit_run_ahead(layers: Sequence[nn.Module]) -> None:
    """Before a layer is gathered, wait until the device has finished all layers but the last ``LAYERS_AHEAD``.

    What is gathered for a layer is allocated when the host asks for it, and can be used again when the device has
    computed with it. The host is faster, and DeepSpeed makes it wait for gathers only, which do not wait for the
    computation: without this limit the device can hold most of the base (read in DeepSpeed 0.19.8). Call it after
    ``deepspeed.initialize``, whose hooks gather. Does nothing where the device is a CPU.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.is_synchronized_device():
        return
    started: deque[Any] = deque()  # an event for each layer that the device may not have finished

    def wait(*_: Any) -> None:
        if len(started) == LAYERS_AHEAD:
            started.popleft().synchronize()
        event = accelerator.Event()
        event.record()
        started.append(event)

    def before_forward(*_: Any) -> None:
        if not is_recomputed():  # else backward has waited
            wait()

    def after_forward(_: nn.Module, __: Any, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        if hidden_states.requires_grad:
            hidden_states.register_hook(wait)

    for layer in layers:
        layer.register_forward_pre_hook(before_forward, prepend=True)
        layer.register_forward_hook(after_forward)
