"""Decoder layers that DeepSpeed gathers whole, without the Python that it needs where it gathers module by module."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

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
        setattr(layer, _GATHERED, [one for one in layer.parameters() if not one.ds_persist])  # type: ignore[attr-defined]
        for module in layer.modules():
            if module is not layer:
                unchecked = Unchecked(parent_module=module)
                unchecked.update(module._parameters)
                module._parameters = unchecked
    if not hasattr(coordinator.iter_params, "__wrapped__"):
        coordinator.iter_params = _listing_gathered(coordinator.iter_params)


def _listing_gathered(iter_params: Any) -> Any:
    """DeepSpeed's function that lists what a module needs, with what ``shorten_lookups`` has noted."""

    def listed(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
        found = module.__dict__.get(_GATHERED)
        listing: Iterable[nn.Parameter] = found if found is not None and recurse else iter_params(module, recurse)
        return listing

    listed.__wrapped__ = iter_params  # type: ignore[attr-defined]
    return listed
