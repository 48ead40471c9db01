"""Checkpoints in which matrices of the base itself were trained: ``trained.safetensors``, under the base's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qvtune.base.source import BaseWeights, StoredTensor, read_headers
from qvtune.errors import UserError
from qvtune.merge.adapter import Adapter


@dataclass(frozen=True)
class ReadAnew:
    """A tensor that was trained itself, and is read only when it is wanted."""

    weights: BaseWeights
    name: str

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``. Raises UserError for values that are not finite."""
        value = self.weights.read_flat(self.name).view(weight.shape).float()
        if self.name in self.weights.not_finite:
            raise UserError(f"{self.weights[self.name].file}: {self.name} holds values that are not finite")
        return value


def trained_dtype(file: Path) -> torch.dtype:
    """The dtype of the first tensor: training's compute dtype."""
    return next((tensor.dtype for tensor in read_headers([file]).values()), torch.float32)


def full_adapter(file: Path, base: Mapping[str, StoredTensor]) -> Adapter:
    """Every tensor of ``file`` in the place of the base's. Raises UserError listing all that do not fit."""
    weights = BaseWeights(file.parent, read_headers([file]))
    problems = []
    for name, tensor in weights.items():
        if name not in base:
            problems.append(f"{file}: {name} {list(tensor.shape)} has no place in the base")
        elif tensor.shape != base[name].shape:
            found, expected = list(tensor.shape), list(base[name].shape)
            problems.append(f"{file}: {name} has shape {found}, the base needs {expected}")
    if not weights:
        problems.append(f"{file}: holds no tensors")
    if problems:
        raise UserError([*problems, "the checkpoint and the base must belong together; another is chosen by --base"])
    return Adapter({name: ReadAnew(weights, name) for name in weights}, trained_dtype(file))
