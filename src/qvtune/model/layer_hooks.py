"""What ZeRO-3 does around each decoder layer, a leaf module, with less Python than DeepSpeed's own hooks.

DeepSpeed puts autograd functions around a layer's input and output, and asks torch for a backward hook of the module,
which is two more of them. A layer has one input and one output with a gradient, so a hook on each of these two tensors
is enough.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def shorten_hooks(engine: Any, layers: Sequence[nn.Module]) -> None:
    """Replace DeepSpeed's hooks of ``layers`` by shorter ones; those of others stay, and run before these.

    ``engine``: what ``deepspeed.initialize`` has returned, with stage 3. A layer takes its hidden states as its first
    positional argument, as those of transformers do.
    """
    offload, optimizer = engine.optimizer.parameter_offload, engine.optimizer
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    layer_of = {id(getattr(layer, kind)): layer for layer in layers for kind in kinds}
    reduce_of: dict[nn.Module, Callable[..., None]] = {}  # where something is trained
    for handle in (*offload.forward_hooks, *offload.backward_hooks, *optimizer._leaf_module_hooks):
        hooks = handle.hooks_dict_ref()
        layer = layer_of.get(id(hooks))
        if layer is not None:
            if hooks is layer._backward_hooks:
                reduce_of[layer] = hooks[handle.id]
            handle.remove()
    for layer in layers:
        _hook(layer, offload, reduce_of.get(layer, lambda *_: None))


def _hook(layer: Any, offload: Any, reduce_gradients: Callable[..., None]) -> None:
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    def before_forward(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if is_recomputed():
            return
        offload.pre_sub_module_forward_function(layer)
        if inputs[0].requires_grad:
            inputs[0].register_hook(after_backward)

    def after_forward(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if is_recomputed():
            return
        FWD_MODULE_STACK.pop()
        offload.post_sub_module_forward_function(layer)
        hidden_states = output[0] if isinstance(output, tuple) else output
        if hidden_states.grad_fn is not None:
            assert inputs[0].requires_grad, "nothing would reduce the gradients of this layer"
            # After the hooks of the tensor itself: the layer whose input it is releases before this one is gathered.
            hidden_states.grad_fn.register_prehook(before_backward)

    def before_backward(_: Any) -> None:
        offload.pre_sub_module_backward_function(layer)

    def after_backward(_: torch.Tensor) -> None:
        reduce_gradients(layer, None, None)
        offload.post_sub_module_backward_function(layer)

    layer.register_forward_pre_hook(before_forward)
    layer.register_forward_hook(after_forward)


def is_recomputed() -> bool:
    """Whether this forward is a part of a backward: activation checkpointing around the layer, not inside of it.

    It has been gathered for that backward.
    """
    return torch._C._current_graph_task_id() != -1
