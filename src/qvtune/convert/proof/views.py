"""The models that a proof compares: where the weights of each come from, and the adapter evaluated beside them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
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

# Name of a stored tensor, first and last row (None: to its end) -> these rows.
ReadRows = Callable[[str, int, int | None], torch.Tensor]


@dataclass(frozen=True)
class ModelView:
    """A model: the tensors ``names`` that ``read`` gives, and ``changes`` that an adapter makes of some of them."""

    names: Collection[str]
    read: ReadRows
    changes: Mapping[str, Change] = field(default_factory=dict)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows ``[first, last)`` in fp32, with the change applied."""
        change = self.changes.get(name)
        if change is not None and not change.is_row_wise:
            return change.apply(self.read(name, 0, None).float())[first:last]
        rows = self.read(name, first, last).float()
        return rows if change is None else change.rows(first, first + len(rows)).apply(rows)


@dataclass(frozen=True)
class ModelViews:
    """``adapted`` is what was trained; ``reference`` is base + adapter on the weights that were chosen, most often the
    same; ``other`` what a merge with the other choice of weights would give, where there is one."""

    before: ModelView
    adapted: ModelView
    reference: ModelView
    merged: ModelView
    other: ModelView | None


def model_views(conversion: "Conversion", merged: ModelView) -> ModelViews:
    """The models around a merge."""
    chosen = adapted_base(conversion.base, conversion.adapter)
    trained, other = chosen, None
    if (opened := conversion.open_other_base()) is not None:
        other = as_merged(opened, conversion.adapter, conversion.dtype)
        if conversion.other_choice == "dequantized":  # and quantized it was, since there is a choice
            trained = adapted_base(opened, conversion.adapter)
    return ModelViews(ModelView(trained.names, trained.read), trained, chosen, merged, other)


def adapted_base(base: MergeBase, adapter: Adapter) -> ModelView:
    """The base as training in ``adapter.dtype`` sees it, and the adapter beside it."""
    return ModelView(
        (base.tensors.keys() - adapter.dropped) | adapter.added.keys(), _base_rows(base, adapter), adapter.changes
    )


def _base_rows(base: MergeBase, adapter: Adapter) -> ReadRows:
    def read(name: str, first: int, last: int | None) -> torch.Tensor:
        if name in adapter.added:
            return adapter.added[name][first:last].to(adapter.dtype)
        return _rows_of(base, name, first, last).to(adapter.dtype)

    return read


def merged_folder(folder: Path) -> ModelView:
    """What has been written."""
    weights = open_weights(folder, any_dtype=True)
    return as_stored(MergeBase(folder, weights, weights.tensors, {}, None))


def as_stored(base: MergeBase) -> ModelView:
    """A model of tensors as they are, those in 4 bits dequantized."""
    return ModelView(base.tensors.keys(), lambda name, first, last: _rows_of(base, name, first, last))


def as_merged(base: MergeBase, adapter: Adapter, dtype: torch.dtype) -> ModelView:
    """What a merge into ``base`` would write."""
    merger = Merger(base, adapter, dtype)
    plans = {plan.name: plan for plan in merger.plan()}

    def read(name: str, first: int, last: int | None) -> torch.Tensor:
        if merger.kind(name) == "copied":
            return _rows_of(base, name, first, last)
        return torch.cat(list(merger.pieces(name))).view(plans[name].shape)[first:last]

    return ModelView(plans.keys(), read)


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
