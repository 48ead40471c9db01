"""Opening the base of what is to be merged."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qvtune.base import prequantized
from qvtune.base.loader import Base, open_base
from qvtune.base.source import model_folder, open_weights
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.merge.source import Source
from qvtune.paths import cache_dir

BaseChoice = Literal["dequantized", "original"]


@dataclass(frozen=True)
class OpenedBase:
    """``model`` says what the base in ``folder`` is loaded as; ``dtype`` is that of training, or the base's own."""

    folder: Path
    model: ModelSection
    base: Base
    dtype: torch.dtype


def open_base_of(source: Source, choice: BaseChoice | None, allow_pickle: bool = False) -> OpenedBase:
    """The base of ``source`` as ``choice`` wants it: None = as it was trained on, as far as known.

    Of adapters from elsewhere that is not known: the original weights, unless the base's folder holds 4-bit ones. With
    ``original`` any architecture will do, since nothing but names and shapes is needed. Raises UserError.
    """
    if source.kind in ("checkpoint", "full"):
        return _open_ours(source, choice)
    try:
        folder = model_folder(source.model.name_or_path, cache_dir())
    except UserError as error:
        advice = f"{source.path} names that base; where it is now is given with --base"
        raise UserError([*error.problems, advice]) from error
    weights = open_weights(folder, allow_pickle, any_dtype=True)
    stored = prequantized.stored_matrices(weights)
    found = Counter(tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point)
    dtype = found.most_common(1)[0][0]
    update = {"allow_pickle": allow_pickle}
    if stored or choice == "dequantized":
        double_quant = next((entry.double_quant for entry in stored.values()), True)
        model = source.model.model_copy(update=update | {"quantization": "nf4", "double_quant": double_quant})
        model = _as_chosen(model, choice)
        return OpenedBase(folder, model, open_base(folder, model, dtype, attention="sdpa"), dtype)
    _require_plain(folder)
    model = source.model.model_copy(update=update)
    return OpenedBase(folder, model, Base(nn.Module(), weights, {}), dtype)


def _open_ours(source: Source, choice: BaseChoice | None) -> OpenedBase:
    model = _as_chosen(source.model, choice)
    folder, dtype = model_folder(model.name_or_path, cache_dir()), source.dtype or torch.float32
    return OpenedBase(folder, model, open_base(folder, model, dtype, attention="sdpa"), dtype)


def _as_chosen(trained_on: ModelSection, choice: BaseChoice | None) -> ModelSection:
    if choice == "dequantized" and trained_on.quantization == "none":
        raise UserError(
            "--base-weights dequantized: the run was trained on the original weights (model.quantization: none), there "
            "are no others; leave the option out"
        )
    return trained_on.model_copy(update={"quantization": "none"}) if choice == "original" else trained_on


def _require_plain(folder: Path) -> None:
    """Raises UserError where the weights are packed in a format that is not read here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantization := config.get("quantization_config"):
        raise UserError(
            f"{folder}/config.json: the weights are quantized by {quantization.get('quant_method')!r}; give the folder "
            "of the original weights with --base"
        )
