"""Decoder layers that DeepSpeed gathers whole, without the Python that it needs where it gathers module by module."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from qvtune.model.gather import JointParameter, joined

_GATHERED = "_qvtune_gathered"  # attribute of a layer: the parameters that come and go


def shorten_lookups(root: nn.Module, layers: Sequence[nn.Module], persistent: Sequence[nn.Parameter]) -> None:
    """Let DeepSpeed look at the parameters of ``layers``, leaf modules, that it has to gather, and at these only.

    It lists and asks all parameters of a layer five times per micro-batch; those that stay gathered (``persistent``)
    are asked here once, before ``root`` runs. In the modules of a layer it looks, at each use of a parameter, whether
    that is there; when a leaf module runs everything is.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    class Unchecked(ZeROOrderedDict):  # type: ignore[misc]
        __getitem__ = OrderedDict.__getitem__

    def gather_persistent(*_: Any) -> None:
        if any(parameter.ds_status is not ZeroParamStatus.AVAILABLE for parameter in few):
            few[0].all_gather(few)

    few: list[Any] = list(persistent)
    root.register_forward_pre_hook(gather_persistent, prepend=True)
    for layer in layers:
        setattr(layer, _GATHERED, joined(layer.parameters()))
        for module in layer.modules():
            if module is not layer:
                unchecked = Unchecked(parent_module=module)
                unchecked.update(module._parameters)
                module._parameters = unchecked
    joint = [one for layer in layers for one in getattr(layer, _GATHERED) if isinstance(one, JointParameter)]
    inside = {id(one) for several in joint for one in several.parameters}
    setattr(root, _GATHERED, [*joint, *(one for one in root.parameters() if id(one) not in inside)])
    if not hasattr(coordinator.iter_params, "__wrapped__"):
        coordinator.iter_params = _listing_gathered(coordinator.iter_params)


def shorten_steps(engine: Any, layers: Sequence[nn.Module]) -> None:
    """Leave out what DeepSpeed does in every micro-batch for what is not there.

    Before and after forward it walks through all modules to tell their dictionaries of parameters to look for
    parameters of other modules, which those in ``layers`` do not do. Around each of its functions it records a range
    for Nsight Systems. It asks for the rank wherever it has a text for rank 0 to print, of which it prints none.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import nvtx

    def walking_outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def walking(*arguments: Any) -> Any:
            root.modules = lambda: iter(outside)
            try:
                return function(*arguments)
            finally:
                del root.modules

        return walking

    root: Any = engine.module
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in root.modules() if module not in inside]
    engine._forward_prologue = walking_outside(engine._forward_prologue)
    engine._forward_epilogue = walking_outside(engine._forward_epilogue)
    nvtx.enable_nvtx = "NSYS_PROFILING_SESSION_ID" in os.environ
    coordinator.print_rank_0 = lambda *_, **__: None


def _listing_gathered(iter_params: Any) -> Any:
    """DeepSpeed's function that lists what a module needs, with what ``shorten_lookups`` has noted."""

    def listed(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
        found = module.__dict__.get(_GATHERED)
        listing: Iterable[nn.Parameter] = found if found is not None and recurse else iter_params(module, recurse)
        return listing

    listed.__wrapped__ = iter_params  # type: ignore[attr-defined]
    return listed
