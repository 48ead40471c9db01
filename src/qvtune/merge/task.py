"""What is to be merged into what, found and checked before anything is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qvtune.base.source import model_folder
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.merge.adapter import Adapter
from qvtune.merge.base import MergeBase, open_merge_base
from qvtune.merge.source import Source
from qvtune.paths import cache_dir

BaseChoice = Literal["dequantized", "original"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Task:
    """A merge that can be done: ``model`` says what the base is read as, ``adapter`` fits it, ``dtype`` is that of
    computed tensors, ``settings`` replace those of the base's config.json."""

    source: Source
    model: ModelSection
    base: MergeBase
    adapter: Adapter
    dtype: torch.dtype
    settings: Mapping[str, Any]

    @property
    def base_weights(self) -> BaseChoice:
        """What the adapter is added to."""
        return "dequantized" if self.base.quantized else "original"

    @property
    def is_classifier(self) -> bool:
        """Whether the merged model gives the logits of classes instead of tokens."""
        config = json.loads((self.base.folder / "config.json").read_text(encoding="utf-8")) | dict(self.settings)
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])

    def opened_as(self, choice: BaseChoice) -> MergeBase:
        """The base once more, nothing of it read yet, with the weights of this or of the other choice."""
        quantization = self.source.model.quantization if choice == "dequantized" else "none"
        model = self.source.model.model_copy(update={"quantization": quantization})
        return open_merge_base(self.base.folder, model, self.adapter.dtype)

    @property
    def other_choice(self) -> BaseChoice | None:
        """What the adapter could have been added to instead; None where the base has one kind of weights only."""
        if self.base_weights == "original":
            return "dequantized" if self.source.model.quantization == "nf4" else None
        stored_in_4_bits = self.base.opened is not None and self.base.opened.stored
        return None if stored_in_4_bits else "original"


def open_task(source: Source, base_weights: BaseChoice | None, dtype: DtypeChoice) -> Task:
    """Open the base and read the adapter. Raises UserError with what does not fit together."""
    model = _as_chosen(source.model, base_weights)
    folder = model_folder(model.name_or_path, cache_dir())
    base = open_merge_base(folder, model, source.dtype or torch.float32)
    adapter = source.adapter(base.tensors)
    merged_dtype = adapter.dtype if dtype == "auto" else getattr(torch, dtype)
    return Task(source, model, base, adapter, merged_dtype, _settings(adapter))


def _as_chosen(trained_on: ModelSection, base_weights: BaseChoice | None) -> ModelSection:
    if base_weights == "dequantized" and trained_on.quantization == "none":
        raise UserError(
            "--base-weights dequantized: the run was trained on the original weights (model.quantization: none), there "
            "are no others; leave the option out"
        )
    return trained_on.model_copy(update={"quantization": "none"}) if base_weights == "original" else trained_on


def _settings(adapter: Adapter) -> dict[str, Any]:
    """What an added classification head changes in config.json, beside ``architectures``."""
    return {}
