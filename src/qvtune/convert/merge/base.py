"""The base as a merge reads it: any range of any tensor, with the values of its files or those of training's NF4.

Nothing here needs transformers or bitsandbytes unless matrices go through NF4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError, naming_setting
from qvtune.model.fingerprint import ContentChecksums, Fingerprint
from qvtune.model.shard import Whole
from qvtune.storage.safetensors import StoredTensor, TensorFiles, open_weights

if TYPE_CHECKING:
    from qvtune.model.loader import Base
    from qvtune.model.nf4 import Layout

ReadFlat = Callable[[int, int], torch.Tensor]  # [start, end) of the flattened tensor -> 1-D tensor


@dataclass(frozen=True)
class MergeBase:
    """``tensors`` are the model's, a 4-bit matrix with its own shape; ``quantized`` are those that go through NF4."""

    folder: Path
    weights: TensorFiles
    tensors: Mapping[str, StoredTensor]
    quantized: "Mapping[str, Layout]"
    opened: "Base | None"

    def reader(self, name: str, checksums: ContentChecksums | None = None) -> ReadFlat:
        """Ranges of one tensor; a quantized matrix gets its codes here, and its values at each read.

        What is read of the base's files is added to ``checksums``: with them each element must be read once.
        """
        if name not in self.quantized:

            def read(start: int, end: int) -> torch.Tensor:
                data = self.weights.read(name, start, end)
                if checksums is not None:
                    checksums.add(name, data, start)
                return data

            return read
        from qvtune.model.loader import quantized_pieces
        from qvtune.model.nf4 import dequantize_range

        assert self.opened is not None
        layout, whole = self.quantized[name], Whole(torch.device("cpu"))
        path = name.removesuffix(".weight")
        pieces, offset = quantized_pieces(path, layout, self.opened, whole, checksums)
        return lambda start, end: dequantize_range(pieces, offset, layout, start, end)

    def fingerprint(self, checksums: ContentChecksums) -> Fingerprint:
        """The fingerprint of what has been read. Raises UserError naming tensors with NaN or infinite values."""
        if self.opened is not None:
            from qvtune.model.prequantized import descriptions

            for name in descriptions(self.weights, self.opened.stored):
                checksums.set_whole(name, self.weights.read(name))
        return checksums.fingerprint(Whole(torch.device("cpu")))


def open_merge_base(folder: Path, model: ModelSection, dtype: torch.dtype) -> MergeBase:
    """Open the base with ``model.quantization`` as the merge wants it; ``dtype`` is training's.

    Raises UserError for weights that cannot be read so. What is not quantized may be of any architecture.
    """
    if model.quantization == "none":
        with naming_setting("--base"):
            weights = open_weights(folder, model.allow_pickle, any_dtype=True)
        if any(".quant_state." in name for name in weights):
            raise UserError(
                f"{folder}: the weights are stored in 4 bits, so there are no original ones; leave --base-weights "
                "original out, or give the folder of the original weights"
            )
        return MergeBase(folder, weights, weights.tensors, {}, None)
    from qvtune.model.loader import open_base

    with naming_setting("--base"):
        opened = open_base(folder, model, dtype, attention="sdpa")
    return MergeBase(folder, opened.weights, opened.tensors(), opened.quantized(), opened)
