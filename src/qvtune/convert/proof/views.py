"""The models that a proof compares: where the weights of each come from, and how an adapter is evaluated unmerged."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qvtune.convert.merge.base import MergeBase
from qvtune.convert.merge.changes import Adapter, Change, LowRank
from qvtune.convert.merge.tensors import Merger
from qvtune.storage.safetensors import open_weights

if TYPE_CHECKING:
    from qvtune.convert.conversion import Conversion

# Name of a tensor, first and last row (None: to its end) -> these rows, as stored or as dequantized.
ReadRows = Callable[[str, int, int | None], torch.Tensor]


@dataclass(frozen=True)
class ModelView:
    """A model whose weights are computed when they are needed, from stored values and the changes of an adapter.

    ``base_dtype``: the dtype that stored values are rounded to before a change (None: not rounded). ``merger`` rounds
    the merged values; without one, low-rank changes are evaluated beside the weights (``unmerged``), as in training.
    Views with the same ``read`` have the same stored values.
    """

    names: Collection[str]
    read: ReadRows
    changes: Mapping[str, Change] = field(default_factory=dict)
    base_dtype: torch.dtype | None = None
    merger: Merger | None = None

    def weight(self, name: str, stored: torch.Tensor, change: Change | None) -> torch.Tensor:
        """``stored`` values of tensor ``name`` in fp32, with ``change`` applied."""
        weight = (stored if self.base_dtype is None else stored.to(self.base_dtype)).float()
        if change is not None:
            weight = change.apply(weight)
        if self.merger is None or self.merger.kind(name) == "copied":
            return weight
        return self.merger.rounded(name, weight).float()

    def rows(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows ``[first, last)`` in fp32, with the change applied."""
        change = self.changes.get(name)
        if change is not None and not change.is_row_wise:
            return self.weight(name, self.read(name, 0, None), change)[first:last]
        stored = self.read(name, first, last)
        return self.weight(name, stored, None if change is None else change.rows(first, first + len(stored)))


@dataclass(frozen=True)
class ModelViews:
    """``before``: the base as trained on. ``adapted``: with the adapter, as trained. ``reference``: the adapter on the
    chosen base weights, most often the same. ``merged``: what was written. ``other``: what a merge into the other base
    weights would be, where there are others."""

    before: ModelView
    adapted: ModelView
    reference: ModelView
    merged: ModelView
    other: ModelView | None


def model_views(conversion: "Conversion", merged: ModelView) -> ModelViews:
    """The models to compare with ``merged``."""
    reference = adapted_base(conversion.base, conversion.adapter)
    adapted, other = reference, None
    if (base := conversion.other_base) is not None:
        other = as_merged(base, conversion.adapter, conversion.dtype)
        if conversion.other_choice == "dequantized":  # there is a choice only where training was on NF4
            adapted = replace(adapted_base(base, conversion.adapter), read=other.read)
    return ModelViews(replace(adapted, changes={}), adapted, reference, merged, other)


def adapted_base(base: MergeBase, adapter: Adapter) -> ModelView:
    """The base as training in ``adapter.dtype`` sees it, and the adapter unmerged."""
    names = (base.tensors.keys() - adapter.dropped) | adapter.added.keys()
    return ModelView(names, _base_rows(base, adapter), adapter.changes, base_dtype=adapter.dtype)


def as_merged(base: MergeBase, adapter: Adapter, dtype: torch.dtype) -> ModelView:
    """What a merge into ``base`` would write."""
    merger = Merger(base, adapter, dtype)
    names = [plan.name for plan in merger.plan()]
    return ModelView(names, _base_rows(base, adapter), adapter.changes, merger=merger)


def merged_folder(folder: Path) -> ModelView:
    """What has been written."""
    weights = open_weights(folder, any_dtype=True)
    return as_stored(MergeBase(folder, weights, weights.tensors, {}, None))


def as_stored(base: MergeBase) -> ModelView:
    """The tensors of a folder, those in 4 bits dequantized."""
    return ModelView(base.tensors.keys(), lambda name, first, last: _rows_of(base, name, first, last))


def _base_rows(base: MergeBase, adapter: Adapter) -> ReadRows:
    def read(name: str, first: int, last: int | None) -> torch.Tensor:
        return adapter.added[name][first:last] if name in adapter.added else _rows_of(base, name, first, last)

    return read


def _rows_of(base: MergeBase, name: str, first: int, last: int | None) -> torch.Tensor:
    shape = base.tensors[name].shape
    columns = torch.Size(shape[1:]).numel()
    end = shape[0] if last is None else min(last, shape[0])
    return base.reader(name)(first * columns, end * columns).view(end - first, *shape[1:])


def unmerged(change: LowRank) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    """A forward hook that adds the adapter's part to a linear module with the base's weight W: PEFT's own formula.

    LoRA: ``x W^T + s (x A^T) B^T``. DoRA: ``m / ||W + s B A|| * (x W^T + s (x A^T) B^T)``, norms by output, computed
    without W + s B A: ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2``.
    """
    factor_a, factor_b, scaling = change.factor_a.float(), change.factor_b.float(), change.scaling

    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        update = scaling * (args[0] @ factor_a.T) @ factor_b.T
        if change.magnitude is None:
            return output + update
        weight = module.weight.T if change.transposed else module.weight
        assert isinstance(weight, torch.Tensor)
        squared = weight.square().sum(1)
        squared = squared + 2 * scaling * ((weight @ factor_a.T) * factor_b).sum(1)
        squared = squared + scaling**2 * ((factor_b @ (factor_a @ factor_a.T)) * factor_b).sum(1)
        bias = torch.zeros(()) if module.bias is None else module.bias
        assert isinstance(bias, torch.Tensor)
        return (output - bias + update) * (change.magnitude.float().flatten() / squared.sqrt()) + bias

    return add
