"""What an adapter makes of each tensor of its base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """What becomes of one tensor of the base."""

    def apply(self, weight: Tensor) -> Tensor:
        """From fp32 in the base tensor's shape to fp32 in the same shape; ``weight`` itself is left alone."""
        ...


@dataclass(frozen=True)
class LowRank:
    """``W + scaling * B A`` (LoRA, arXiv 2106.09685) with A [rank, in], B [out, rank]; with a ``magnitude`` m [out]
    ``m * (W + scaling * B A) / ||W + scaling * B A||``, norms by output (DoRA, arXiv 2402.09353).

    ``transposed``: the base stores [in, out], as GPT-2's Conv1D (PEFT's fan_in_fan_out) and embeddings do.
    """

    factor_a: Tensor
    factor_b: Tensor
    scaling: float
    transposed: bool = False
    magnitude: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``."""
        update = (self.factor_b.float() @ self.factor_a.float()) * self.scaling
        adapted = weight + (update.T if self.transposed else update)
        if self.magnitude is None:
            return adapted
        across_inputs = 0 if self.transposed else 1
        norm: Tensor = torch.linalg.vector_norm(adapted, dim=across_inputs, keepdim=True)
        return adapted * (self.magnitude.float().view(norm.shape) / norm)


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained itself: ``modules_to_save``, biases, full-parameter checkpoints."""

    tensor: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``."""
        assert self.tensor.shape == weight.shape, (self.tensor.shape, weight.shape)
        return self.tensor.float()


@dataclass(frozen=True)
class RowsReplaced:
    """Single tokens of an embedding that were trained: ``rows`` [len(indices), width]."""

    indices: tuple[int, ...]
    rows: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``."""
        return weight.index_copy(0, torch.tensor(self.indices, dtype=torch.long), self.rows.float())


@dataclass(frozen=True)
class Both:
    """One change after the other."""

    first: Change
    second: Change

    def apply(self, weight: Tensor) -> Tensor:
        """As ``Change``."""
        return self.second.apply(self.first.apply(weight))


@dataclass(frozen=True)
class Adapter:
    """All that is to be done to a base.

    ``changes`` go by the name of the base's tensor. ``added`` are tensors that it does not have (a classification
    head, an output matrix that is no longer tied), written in the merged dtype; ``dropped`` are tensors that the
    adapted model does not have (the head of another task); ``config`` is what to change in config.json. ``dtype`` is
    that of the factors; ``peft_config`` is the content of adapter_config.json where there is one.
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
