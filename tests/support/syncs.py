"""Operations for which the host has to wait for a device, found while they run; on a CPU too, where nothing waits."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Results whose value, or whose size, the host needs to go on.
_READS = {
    "_local_scalar_dense",  # item, float(), int(), bool()
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "repeat_interleave",  # of a tensor of counts
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a mask has to be searched


class Syncs(TorchDispatchMode):
    """Notes how often each such operation runs, as "operation in function of file.py".

    On tensors of the device "meta", which have no values, such operations raise an error instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args, kwargs or {}):
            key = f"{func.overloadpacket.__name__} in {_place()}"
            self.found[key] = self.found.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.overloadpacket.__name__
    if name in _INDEXED:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    on_device = any(tensor.device.type != "cpu" for tensor in tensors)
    if name == "_to_copy":
        target = kwargs.get("device")
        return on_device and target is not None and torch.device(target).type == "cpu"
    if name == "copy_":
        return on_device and args[0].device.type == "cpu"
    return name in _READS


def _place() -> str:
    """The innermost function of this project or of transformers; "autograd" in backward, which has none."""
    for frame in reversed(traceback.extract_stack()):
        if "/qvtune/" in frame.filename or "/transformers/" in frame.filename or "/deepspeed/" in frame.filename:
            return f"{frame.name} of {Path(frame.filename).name}"
    return "autograd"
