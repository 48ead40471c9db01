"""Computes the tensors of the merged model, a block of rows at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qvtune.convert.merge.base import MergeBase
from qvtune.convert.merge.changes import Adapter, Change
from qvtune.errors import UserError
from qvtune.model.fingerprint import ContentChecksums
from qvtune.storage.writer import TensorPlan

COPIED = 2**22  # elements copied at a time
COMPUTED = 2**18  # elements computed at a time: temporaries stay in the cache
_LOST_BELOW = 0.9


@dataclass(frozen=True)
class MatrixUpdate:
    """Frobenius norms of an update (dW), of the weight it is added to (W) and of the rounding error of the output's
    dtype, and the share of the update that rounding keeps.

    ``ratio`` = update_norm / weight_norm. ``kept`` = <round(W + dW) - round(W), dW> / ||dW||^2: 1 where the update
    survives on average, 0 where rounding gives W back. Where W is representable in the dtype and dW is below half a
    step, the update is always lost. Elsewhere the error is noise of ``rounding_norm``: ``kept`` stays near 1, but the
    noise hides the update when it is larger than it.
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
    """Computes changed tensors in ``dtype``, dequantizes the ones that training quantized, and copies all others.

    ``updates`` gets an entry when a changed matrix has been computed; what is read of the base is added to
    ``checksums``, so with them each tensor is asked for once. Several threads may ask for different tensors.
    """

    def __init__(
        self, base: MergeBase, adapter: Adapter, dtype: torch.dtype, checksums: ContentChecksums | None = None
    ) -> None:
        self._base, self._adapter, self._dtype, self._checksums = base, adapter, dtype, checksums
        self.updates: dict[str, MatrixUpdate] = {}

    def plan(self) -> list[TensorPlan]:
        """Every tensor of the merged model, in the order in which the base's files store them."""
        kept = [tensor for name, tensor in self._base.tensors.items() if name not in self._adapter.dropped]
        stored = sorted(kept, key=lambda tensor: (tensor.file, tensor.offset))
        plans = [
            TensorPlan(tensor.name, tensor.dtype if self.kind(tensor.name) == "copied" else self._dtype, tensor.shape)
            for tensor in stored
        ]
        added = self._adapter.added.items()
        return plans + [TensorPlan(name, self._dtype, tuple(tensor.shape)) for name, tensor in added]

    def kind(self, name: str) -> Literal["adapted", "added", "dequantized", "copied"]:
        """How a tensor of the merged model is made."""
        if name in self._adapter.changes:
            return "adapted"
        if name in self._adapter.added:
            return "added"
        return "dequantized" if name in self._base.quantized else "copied"

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor as planned, flattened, in consecutive 1-D pieces; a copied one bit by bit.

        Raises UserError when a value is too large for the dtype.
        """
        kind = self.kind(name)
        if kind == "added":
            yield self.rounded(name, self._adapter.added[name].flatten())
        elif kind == "adapted":
            yield from self._adapted(name, self._adapter.changes[name])
        else:
            read, total = self._base.reader(name, self._checksums), self._base.tensors[name].numel
            chunk = COPIED if kind == "copied" else COMPUTED
            for start in range(0, total, chunk):
                values = read(start, min(start + chunk, total))
                yield values if kind == "copied" else self.rounded(name, values)

    def _adapted(self, name: str, change: Change) -> Iterator[torch.Tensor]:
        read, shape = self._base.reader(name, self._checksums), self._base.tensors[name].shape
        num_rows, columns = shape[0], math.prod(shape[1:])
        step = max(1, COMPUTED // columns) if change.is_row_wise else num_rows
        sums = torch.zeros(4, dtype=torch.float64)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            before = read(first * columns, last * columns).float().view(last - first, *shape[1:])
            after = (change.rows(first, last) if change.is_row_wise else change).apply(before)
            merged = self.rounded(name, after)
            sums += self._measure(before, after, merged)
            yield merged.flatten()
        self.updates[name] = _update(name, sums.tolist())

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Computed values of tensor ``name`` in the output's dtype. Raises UserError when one is too large for it."""
        rounded = values.to(self._dtype)
        if not rounded.isfinite().all():
            largest = values.abs().max()
            raise UserError(f"{name}: values up to {largest:.3g} do not fit {self._dtype}; choose another --dtype")
        return rounded

    def _measure(self, before: torch.Tensor, after: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        """Sums over a block of rows: ||dW||^2, ||W||^2, ||rounding error||^2, <round(W + dW) - round(W), dW>."""
        update, written = after - before, merged.float()
        moved = written - before.to(self._dtype).float()
        pairs = ((update, update), (before, before), (written - after,) * 2, (moved, update))
        return torch.stack([torch.dot(left.flatten(), right.flatten()).double() for left, right in pairs])


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
