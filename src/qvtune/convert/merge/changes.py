"""Changes that an adapter makes to the tensors of its base."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qvtune.errors import UserError
from qvtune.storage.checksum import all_finite
from qvtune.storage.safetensors import StoredTensor, TensorFiles


class Change(ABC):
    """Computes the merged value of one tensor from its value in the base."""

    @property
    def is_row_wise(self) -> bool:
        """Whether each row of the result depends on the same row of the weight only."""
        return True

    @abstractmethod
    def rows(self, first: int, last: int) -> "Change":
        """The change restricted to rows ``[first, last)`` of the tensor; defined where ``is_row_wise``."""

    @abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """From fp32 in the base tensor's shape to fp32 in the same shape; ``weight`` is not modified."""


@dataclass(frozen=True)
class LowRank(Change):
    """``W + scaling * B A`` (LoRA, arXiv 2106.09685) with A [rank, in], B [out, rank]; with a ``magnitude`` m [out]
    ``m * (W + scaling * B A) / ||W + scaling * B A||``, norms by output (DoRA, arXiv 2402.09353).

    ``transposed``: the base stores [in, out], as GPT-2's Conv1D (PEFT's fan_in_fan_out) and embeddings do.
    """

    factor_a: Tensor
    factor_b: Tensor
    scaling: float
    transposed: bool = False
    magnitude: Tensor | None = None

    @property
    def is_row_wise(self) -> bool:
        """False for transposed DoRA, whose norms run over all rows."""
        return not (self.transposed and self.magnitude is not None)

    def rows(self, first: int, last: int) -> "LowRank":
        """See ``Change``."""
        assert self.is_row_wise
        if self.transposed:
            return replace(self, factor_a=self.factor_a[:, first:last])
        magnitude = None if self.magnitude is None else self.magnitude.flatten()[first:last]
        return replace(self, factor_b=self.factor_b[first:last], magnitude=magnitude)

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``."""
        update = (self.factor_b.float() @ self.factor_a.float()) * self.scaling
        adapted = weight + (update.T if self.transposed else update)
        if self.magnitude is None:
            return adapted
        across_inputs = 0 if self.transposed else 1
        norm: Tensor = torch.linalg.vector_norm(adapted, dim=across_inputs, keepdim=True)
        return adapted * (self.magnitude.float().view(norm.shape) / norm)


@dataclass(frozen=True)
class Scaled(Change):
    """``l * W`` ((IA)^3, arXiv 2205.05638); ``vector`` l: [out, 1] of outputs, [1, in] of inputs, [out] of a bias."""

    vector: Tensor

    def rows(self, first: int, last: int) -> "Scaled":
        """See ``Change``."""
        return self if self.vector.dim() == 2 and self.vector.shape[0] == 1 else Scaled(self.vector[first:last])

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``."""
        return weight * self.vector.float()


@dataclass(frozen=True)
class Replaced(Change):
    """A tensor that was itself trained: ``modules_to_save`` and biases."""

    tensor: Tensor

    def rows(self, first: int, last: int) -> "Replaced":
        """See ``Change``."""
        return Replaced(self.tensor[first:last])

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``."""
        assert self.tensor.shape == weight.shape, (self.tensor.shape, weight.shape)
        return self.tensor.float()


@dataclass(frozen=True)
class LazyReplacement(Change):
    """As ``Replaced``, for full-parameter checkpoints: rows ``[first, last)`` (None: to the end) of a tensor in a
    safetensors file, read by ``apply``."""

    stored: StoredTensor
    first: int = 0
    last: int | None = None

    def rows(self, first: int, last: int) -> "LazyReplacement":
        """See ``Change``."""
        return LazyReplacement(self.stored, self.first + first, self.first + last)

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``. Raises UserError for values that are not finite."""
        weights = TensorFiles(self.stored.file.parent, {self.stored.name: self.stored})
        width = self.stored.numel // self.stored.shape[0]
        last = self.stored.shape[0] if self.last is None else self.last
        value = weights.read(self.stored.name, self.first * width, last * width).view(weight.shape)
        if not all_finite(value.flatten()):
            raise UserError(f"{self.stored.file}: {self.stored.name} holds values that are not finite")
        return value.float()


@dataclass(frozen=True)
class RowsReplaced(Change):
    """Embeddings of single tokens that were trained: ``values`` [len(indices), width]."""

    indices: tuple[int, ...]
    values: Tensor

    def rows(self, first: int, last: int) -> "RowsReplaced":
        """See ``Change``."""
        inside = [at for at, index in enumerate(self.indices) if first <= index < last]
        return RowsReplaced(tuple(self.indices[at] - first for at in inside), self.values[inside])

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``."""
        return weight.index_copy(0, torch.tensor(self.indices, dtype=torch.long), self.values.float())


@dataclass(frozen=True)
class Composed(Change):
    """``first``, then ``second``."""

    first: Change
    second: Change

    @property
    def is_row_wise(self) -> bool:
        """Whether both are."""
        return self.first.is_row_wise and self.second.is_row_wise

    def rows(self, first: int, last: int) -> "Composed":
        """See ``Change``."""
        return Composed(self.first.rows(first, last), self.second.rows(first, last))

    def apply(self, weight: Tensor) -> Tensor:
        """See ``Change``."""
        return self.second.apply(self.first.apply(weight))


@dataclass(frozen=True)
class Adapter:
    """Everything that a merge does to a base.

    ``changes``: by the name of the base's tensor. ``added``: tensors that the base does not have (a classification
    head, an output matrix that is no longer tied), written in the merged dtype. ``dropped``: tensors that the adapted
    model does not have (the language-model head of a base that became a classifier). ``config``: settings to change in
    config.json. ``dtype``: of the factors. ``peft_config``: content of adapter_config.json where there is one.
    """

    changes: Mapping[str, Change]
    dtype: torch.dtype
    added: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Mapping[str, Any] | None = None

    @property
    def scaling(self) -> float | None:
        """The scaling that all low-rank changes share; None where they differ or there are none."""
        found = {change.scaling for change in self.changes.values() if isinstance(change, LowRank)}
        return found.pop() if len(found) == 1 else None
