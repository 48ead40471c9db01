"""The decoder layers of a model, which ZeRO-3 gathers one by one, and what has to be set so that it can."""

import inspect
from typing import Any

from torch import nn

from qvtune.config.deepspeed import LayerSizes
from qvtune.distributed.reduce_scatter import use_short_reduce_scatter
from qvtune.model.adapters import transformers_model
from qvtune.model.gather import use_one_gather
from qvtune.model.layer_hooks import shorten_hooks
from qvtune.model.nf4 import NF4Linear
from qvtune.model.run_ahead import limit_run_ahead
from qvtune.model.short_lookups import shorten_lookups, shorten_steps

_PERSISTENT_SHARE = 1 / 8  # of a layer's elements: the most that may stay whole on every rank


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, or of an encoder, in order."""
    return [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]


def layer_sizes(model: nn.Module) -> LayerSizes:
    """Of the layers of what ``add_adapters`` returns, which may be without memory."""
    layers = decoder_layers(model)
    largest = max(layers, key=lambda layer: sum(parameter.numel() for parameter in layer.parameters()))
    persistent_numel = _persistent_numel(largest, has_factors=hasattr(model, "peft_config"))
    numels = (parameter.numel() for parameter in largest.parameters())
    return LayerSizes(
        classes=tuple(sorted({type(layer).__name__ for layer in layers})),
        gathered_numel=sum(numel for numel in numels if numel > persistent_numel),
        persistent_numel=persistent_numel,
    )


def _persistent_numel(layer: nn.Module, *, has_factors: bool) -> int:
    """Elements of the largest norm, bias, adapter factor or scale (of NF4) that may stay whole on every rank.

    All parameters of its size and below it together are at most ``_PERSISTENT_SHARE`` of the layer; 0 if none is.
    """
    numels = [parameter.numel() for parameter in layer.parameters()]
    small = {
        parameter.numel()
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (isinstance(module, NF4Linear) and name in ("weight", "absmax"))
        and (parameter.dim() == 1 or (has_factors and parameter.requires_grad))
    }
    allowed = sum(numels) * _PERSISTENT_SHARE
    return max((size for size in small if sum(numel for numel in numels if numel <= size) <= allowed), default=0)


def hook_layers(engine: Any) -> None:
    """Set what a model needs whose layers are gathered; ``engine`` is what ``deepspeed.initialize`` has returned."""
    zero, objective = engine.config["zero_optimization"], engine.module
    if zero["stage"] != 3:
        return
    from deepspeed.utils import z3_leaf_module

    use_one_gather(objective.parameters())
    use_short_reduce_scatter()
    layers = decoder_layers(objective)
    if "leaf_module" in zero:
        # DeepSpeed reduces the gradients of a leaf module when those of its inputs are there. Where no input has one
        # it does so before the module's own gradients are there. Set before DeepSpeed has added its hooks, the
        # embedding would count as a module with a backward, and be gathered for it.
        transformers_model(objective.model).enable_input_require_grads()
        leaves = [layer for layer in layers if z3_leaf_module(layer)]
        shorten_lookups(objective, leaves, engine.optimizer.persistent_parameters)
        shorten_steps(engine, leaves)
        shorten_hooks(engine, leaves)
    limit_run_ahead(layers)


def destroy_engine(engine: Any) -> None:
    """Let go of an engine and its model, for a process that makes another.

    DeepSpeed leaves hooks on modules, functions on parameters and a cache in one of its classes, which hold the model
    where the garbage collector does not look.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    engine.destroy()
    to_release = getattr(Coordinator, f"_{Coordinator.__name__}__params_to_release")
    inspect.getclosurevars(to_release).nonlocals["func"].cache_clear()
    for module in engine.module.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        ):
            hooks.clear()
    for parameter in engine.module.parameters():
        vars(parameter).clear()
