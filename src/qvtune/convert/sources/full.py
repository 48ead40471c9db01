"""Checkpoints in which matrices of the base itself were trained: ``trained.safetensors``, under the base's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qvtune.convert.merge.changes import Adapter
from qvtune.errors import UserError
from qvtune.storage.safetensors import BaseWeights, StoredTensor, read_headers


@dataclass(frozen=True)
class ReadAnew:
    """A tensor that was trained itself, and is read only when it is wanted: rows ``[first, last)``, None = all."""

    stored: StoredTensor
    first: int = 0
    last: int | None = None

    def rows(self, first: int, last: int) -> "ReadAnew":
        """Some of these rows."""
        return ReadAnew(self.stored, self.first + first, self.first + last)

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``. Raises UserError for values that are not finite."""
        weights = BaseWeights(self.stored.file.parent, {self.stored.name: self.stored})
        width = self.stored.numel // self.stored.shape[0]
        last = self.stored.shape[0] if self.last is None else self.last
        value = weights.read_flat(self.stored.name, self.first * width, last * width).view(weight.shape)
        if weights.not_finite:
            raise UserError(f"{self.stored.file}: {self.stored.name} holds values that are not finite")
        return value.float()


def trained_dtype(file: Path) -> torch.dtype:
    """The dtype of the first tensor: training's compute dtype."""
    return next((tensor.dtype for tensor in read_headers([file]).values()), torch.float32)


def full_adapter(file: Path, base: Mapping[str, StoredTensor]) -> Adapter:
    """Every tensor of ``file`` in the place of the base's. Raises UserError listing all that do not fit."""
    trained = read_headers([file])
    problems = []
    for name, tensor in trained.items():
        if name not in base:
            problems.append(f"{file}: {name} {list(tensor.shape)} has no place in the base")
        elif tensor.shape != base[name].shape:
            found, expected = list(tensor.shape), list(base[name].shape)
            problems.append(f"{file}: {name} has shape {found}, the base needs {expected}")
    if not trained:
        problems.append(f"{file}: holds no tensors")
    if problems:
        raise UserError([*problems, "the checkpoint and the base must belong together; another is chosen by --base"])
    return Adapter({name: ReadAnew(tensor) for name, tensor in trained.items()}, trained_dtype(file))
