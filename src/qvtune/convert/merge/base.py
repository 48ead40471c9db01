"""The base as a merge reads it: any range of any tensor, with the values of its files or those of training's NF4.

Nothing here needs transformers or bitsandbytes unless matrices go through NF4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model import fingerprint
from qvtune.model.fingerprint import Fingerprint
from qvtune.storage.safetensors import BaseWeights, StoredTensor, open_weights

if TYPE_CHECKING:
    from qvtune.model.loader import Base
    from qvtune.model.nf4 import Layout

ReadFlat = Callable[[int, int], torch.Tensor]  # [start, end) of the flattened tensor -> 1-D tensor


@dataclass(frozen=True)
class MergeBase:
    """``tensors`` are the model's, a 4-bit matrix with its own shape; ``quantized`` are those that go through NF4."""

    folder: Path
    weights: BaseWeights
    tensors: Mapping[str, StoredTensor]
    quantized: "Mapping[str, Layout]"
    opened: "Base | None"

    def reader(self, name: str) -> ReadFlat:
        """Ranges of one tensor; a quantized matrix gets its codes here, and its values at each read."""
        if name not in self.quantized:
            return partial(self.weights.read_flat, name)
        from qvtune.model.loader import quantized_pieces
        from qvtune.model.nf4 import dequantize_range
        from qvtune.model.shard import Whole

        assert self.opened is not None
        layout, whole = self.quantized[name], Whole(torch.device("cpu"))
        path = name.removesuffix(".weight")
        pieces, offset = quantized_pieces(path, layout, self.opened, whole, gather=lambda own: [own])
        return partial(dequantize_range, pieces, offset, layout)

    def require_finite(self) -> None:
        """Raises UserError naming the tensors, of those read so far, that hold NaN or infinite values."""
        if bad := sorted(self.weights.not_finite):
            raise UserError([f"{self.folder}: tensor {name!r} holds NaN or infinite values" for name in bad])

    def content(self) -> Fingerprint:
        """The fingerprint of all that has been read. Raises UserError naming tensors with NaN or infinite values."""
        if self.opened is not None:
            from qvtune.model.prequantized import note_descriptions

            note_descriptions(self.weights, self.opened.stored)
        return fingerprint.content_of(self.weights, lambda own: [own], torch.device("cpu"))


def open_merge_base(folder: Path, model: ModelSection, dtype: torch.dtype) -> MergeBase:
    """Open the base with ``model.quantization`` as the merge wants it; ``dtype`` is training's.

    Raises UserError for weights that cannot be read so. What is not quantized may be of any architecture.
    """
    if model.quantization == "none":
        weights = open_weights(folder, model.allow_pickle, any_dtype=True)
        if any(".quant_state." in name for name in weights):
            raise UserError(
                f"{folder}: the weights are stored in 4 bits, so there are no original ones; leave --base-weights "
                "original out, or give the folder of the original weights"
            )
        return MergeBase(folder, weights, weights.tensors, {}, None)
    from qvtune.model.loader import open_base

    opened = open_base(folder, model, dtype, attention="sdpa")
    return MergeBase(folder, opened.weights, opened.tensors(), opened.quantized(), opened)
