"""Writing safetensors files tensor by tensor: no more than one of them is in memory at a time.

``safetensors.torch.save_file`` wants all tensors of a file at once. Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qvtune.base.source import ALL_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(
    folder: Path, plans: Sequence[TensorPlan], tensor: Callable[[str], torch.Tensor], max_shard_bytes: int
) -> list[str]:
    """Write ``model.safetensors``, or several files and their index, as transformers names them. Returns the names.

    ``tensor(name)`` is called once for each plan, file after file, and must give what is planned. A tensor larger than
    ``max_shard_bytes`` gets a file of its own.
    """
    shards = _shards(plans, max_shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        total_bytes = sum(plan.num_bytes for plan in plans)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, tensor)
    return names


def _shards(plans: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    return shards


def _write_file(path: Path, plans: Sequence[TensorPlan], tensor: Callable[[str], torch.Tensor]) -> None:
    # Wide dtypes first, so that each tensor begins at a multiple of its element size: readers map the file.
    plans = sorted(plans, key=lambda plan: -plan.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        start, end = end, end + plan.num_bytes
        entry = {"dtype": _DTYPE_NAMES[plan.dtype], "shape": plan.shape, "data_offsets": [start, end]}
        header[plan.name] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for plan in plans:
            value = tensor(plan.name)
            assert value.dtype == plan.dtype and value.shape == plan.shape, (plan, value.dtype, value.shape)
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
