"""What stands in the merged model under each of the base's names, one tensor at a time."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qvtune.base.loader import Base, quantized_pieces
from qvtune.base.nf4 import Layout, NF4Linear
from qvtune.base.shard import Whole
from qvtune.base.writer import TensorPlan
from qvtune.errors import UserError
from qvtune.merge.adapter import Adapter


@dataclass(frozen=True)
class MatrixUpdate:
    """Frobenius norms of what the adapter adds to a matrix and of the matrix before."""

    name: str
    update_norm: float
    weight_norm: float
    ratio: float


class Merger:
    """Computes adapted matrices in ``dtype``, writes quantized ones as training saw them, and leaves the rest alone.

    ``quantized`` are the matrices to be replaced by their NF4 values; ``updates`` grows with each adapted matrix.
    """

    def __init__(self, base: Base, adapter: Adapter, dtype: torch.dtype) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._tensors, self._quantized = base.tensors(), base.quantized()
        self.updates: list[MatrixUpdate] = []

    def plan(self) -> list[TensorPlan]:
        """Every tensor of the merged model, in the order in which the base is read from front to back."""
        kept = [tensor for name, tensor in self._tensors.items() if name not in self._adapter.dropped]
        stored = sorted(kept, key=lambda tensor: (tensor.file, tensor.offset))
        return [
            TensorPlan(tensor.name, tensor.dtype if self.kind(tensor.name) == "copied" else self._dtype, tensor.shape)
            for tensor in stored
        ] + [TensorPlan(name, self._dtype, tuple(tensor.shape)) for name, tensor in self._adapter.added.items()]

    def kind(self, name: str) -> Literal["adapted", "added", "dequantized", "copied"]:
        """What becomes of a tensor of the base, or of the adapter's own."""
        if name in self._adapter.added:
            return "added"
        if name in self._adapter.changes:
            return "adapted"
        return "dequantized" if name in self._quantized else "copied"

    def tensor(self, name: str) -> torch.Tensor:
        """The merged tensor as ``plan`` promises it; the base's own bits where neither NF4 nor the adapter concerns it.

        Raises UserError when a value is too large for the dtype.
        """
        value = self._adapter.added[name] if name in self._adapter.added else self._base_value(name)
        if self.kind(name) == "copied":
            return value
        if self.kind(name) == "adapted":
            value = self._adapted(name, value.float())
        merged = value.to(self._dtype)
        if not merged.isfinite().all():
            raise UserError(
                f"{name}: values up to {value.abs().max():.3g} do not fit {self._dtype}; choose another --dtype"
            )
        return merged

    def _base_value(self, name: str) -> torch.Tensor:
        if name in self._quantized:
            return _through_nf4(self._base, name.removesuffix(".weight"), self._quantized[name])
        return self._base.weights.read_flat(name).view(self._tensors[name].shape)

    def _adapted(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        adapted = self._adapter.changes[name].apply(weight)
        update_norm, weight_norm = float((adapted - weight).norm()), float(weight.norm())
        self.updates.append(MatrixUpdate(name, update_norm, weight_norm, update_norm / weight_norm))
        return adapted


def _through_nf4(base: Base, path: str, layout: Layout) -> torch.Tensor:
    """A matrix quantized and dequantized by the code that training runs, in training's compute dtype."""
    num_out, num_in = layout.shape
    linear = NF4Linear(num_in, num_out, bias=False, double_quant=layout.double_quant, dtype=layout.storage)
    whole = Whole(torch.device("cpu"))
    pieces, linear.offset = quantized_pieces(path, layout, base, whole, gather=lambda own: [own])
    for piece, content in pieces.items():
        setattr(linear, piece, nn.Parameter(content, requires_grad=False))
    return linear.dequantize()
