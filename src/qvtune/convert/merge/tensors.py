"""What stands in the merged model under each name, computed a few rows at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qvtune.convert.merge.base import MergeBase
from qvtune.convert.merge.changes import Adapter, Both, Change, LowRank, Replaced, RowsReplaced
from qvtune.convert.sources.full import ReadAnew
from qvtune.errors import UserError
from qvtune.storage.writer import TensorPlan

COPIED = 2**22  # elements of a tensor that is copied, at a time
COMPUTED = 2**18  # elements of a matrix that is computed: its temporaries stay in the cache
_LOST_BELOW = 0.9


@dataclass(frozen=True)
class MatrixUpdate:
    """Frobenius norms of what the adapter adds to a matrix (dW), of the matrix before (W), of what rounding to the
    output's dtype adds, and how much of the update is left.

    ``ratio`` = update_norm / weight_norm. ``kept`` = <round(W + dW) - round(W), dW> / ||dW||^2: 1 where the whole
    update survives on average, 0 where rounding gives W back. Where W lies on the dtype's grid and dW is below half a
    step, it is lost for certain; between grid points the error is noise of ``rounding_norm``, which leaves ``kept`` at
    1 and drowns the update when it is the larger of the two.
    """

    name: str
    update_norm: float
    weight_norm: float
    ratio: float
    rounding_norm: float
    kept: float

    @property
    def lost(self) -> bool:
        """Whether rounding takes more than a tenth of the update, or is larger than it."""
        return self.update_norm > 0 and (self.kept < _LOST_BELOW or self.rounding_norm > self.update_norm)


class Merger:
    """Computes changed tensors in ``dtype``, writes quantized ones as training saw them, and leaves the rest alone.

    ``updates`` gets an entry when a changed matrix has been computed. Several threads may ask for different tensors.
    """

    def __init__(self, base: MergeBase, adapter: Adapter, dtype: torch.dtype) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self.updates: dict[str, MatrixUpdate] = {}

    def plan(self) -> list[TensorPlan]:
        """Every tensor of the merged model, in the order in which the base is read from front to back."""
        kept = [tensor for name, tensor in self._base.tensors.items() if name not in self._adapter.dropped]
        stored = sorted(kept, key=lambda tensor: (tensor.file, tensor.offset))
        plans = [
            TensorPlan(tensor.name, tensor.dtype if self.kind(tensor.name) == "copied" else self._dtype, tensor.shape)
            for tensor in stored
        ]
        added = self._adapter.added.items()
        return plans + [TensorPlan(name, self._dtype, tuple(tensor.shape)) for name, tensor in added]

    def kind(self, name: str) -> Literal["adapted", "added", "dequantized", "copied"]:
        """What becomes of a tensor."""
        if name in self._adapter.changes:
            return "adapted"
        if name in self._adapter.added:
            return "added"
        return "dequantized" if name in self._base.quantized else "copied"

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor as ``plan`` promises it, flat, in order; the base's own bits where nothing concerns it.

        Raises UserError when a value is too large for the dtype.
        """
        kind = self.kind(name)
        if kind == "added":
            yield self._rounded(name, self._adapter.added[name].flatten())
        elif kind == "adapted":
            yield from self._adapted(name, self._adapter.changes[name])
        else:
            read, total = self._base.reader(name), self._base.tensors[name].numel
            chunk = COPIED if kind == "copied" else COMPUTED
            for start in range(0, total, chunk):
                values = read(start, min(start + chunk, total))
                yield values if kind == "copied" else self._rounded(name, values)

    def _adapted(self, name: str, change: Change) -> Iterator[torch.Tensor]:
        read, shape = self._base.reader(name), self._base.tensors[name].shape
        num_rows, columns = shape[0], math.prod(shape[1:])
        step = max(1, COMPUTED // columns) if goes_by_rows(change) else num_rows
        sums = torch.zeros(4, dtype=torch.float64)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            before = read(first * columns, last * columns).float().view(last - first, *shape[1:])
            after = change_of_rows(change, first, last).apply(before)
            merged = self._rounded(name, after)
            sums += self._measure(before, after, merged)
            yield merged.flatten()
        self.updates[name] = _update(name, sums.tolist())

    def _rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        rounded = values.to(self._dtype)
        if not rounded.isfinite().all():
            largest = values.abs().max()
            raise UserError(f"{name}: values up to {largest:.3g} do not fit {self._dtype}; choose another --dtype")
        return rounded

    def _measure(self, before: torch.Tensor, after: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Of some rows: ||dW||^2, ||W||^2, ||rounding||^2 and <round(W + dW) - round(W), dW>."""
        update, written = after - before, merged.float()
        moved = written - before.to(self._dtype).float()
        pairs = ((update, update), (before, before), (written - after,) * 2, (moved, update))
        return torch.stack([torch.dot(left.flatten(), right.flatten()).double() for left, right in pairs])


def goes_by_rows(change: Change) -> bool:
    """Whether some rows of the result depend on the same rows of the weight alone."""
    if isinstance(change, Both):
        return goes_by_rows(change.first) and goes_by_rows(change.second)
    return not (isinstance(change, LowRank) and change.transposed and change.magnitude is not None)


def change_of_rows(change: Change, first: int, last: int) -> Change:
    """The change of rows ``[first, last)`` of a tensor, which must be all of them where it does not go by rows."""
    match change:
        case Replaced(tensor):
            return Replaced(tensor[first:last])
        case ReadAnew():
            return change.rows(first, last)
        case RowsReplaced(indices, rows):
            inside = [at for at, index in enumerate(indices) if first <= index < last]
            return RowsReplaced(tuple(indices[at] - first for at in inside), rows[inside])
        case Both(one, other):
            return Both(change_of_rows(one, first, last), change_of_rows(other, first, last))
        case LowRank(transposed=True, magnitude=None):
            return replace(change, factor_a=change.factor_a[:, first:last])
        case LowRank(transposed=False):
            magnitude = None if change.magnitude is None else change.magnitude.flatten()[first:last]
            return replace(change, factor_b=change.factor_b[first:last], magnitude=magnitude)
    return change


def _update(name: str, sums: Sequence[float]) -> MatrixUpdate:
    update, weight, rounding, moved = sums
    return MatrixUpdate(
        name,
        update_norm=math.sqrt(update),
        weight_norm=math.sqrt(weight),
        ratio=math.sqrt(update / weight) if weight else math.inf,
        rounding_norm=math.sqrt(rounding),
        kept=moved / update if update else 1.0,
    )
