"""What is to be merged into what, found and checked before anything is written."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qvtune.config.outputs import BaseChoice, DtypeChoice
from qvtune.config.schema import ModelSection
from qvtune.convert.merge.base import MergeBase, open_merge_base
from qvtune.convert.merge.changes import Adapter
from qvtune.convert.sources.source import Source
from qvtune.errors import UserError, naming_setting
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from qvtune.storage.safetensors import open_weights

_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Conversion:
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

    @cached_property
    def is_classifier(self) -> bool:
        """Whether the merged model gives the logits of classes instead of tokens."""
        config = json.loads((self.base.folder / "config.json").read_text(encoding="utf-8")) | dict(self.settings)
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of training is: saved with an adapter from elsewhere, or the base's."""
        path = self.source.path
        places = {"peft": [path], "deepspeed": [path, path.parent]}.get(self.source.kind, [])
        return next((place for place in places if (place / "tokenizer_config.json").is_file()), self.base.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of ``tokenizer_folder``."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_folder, trust_remote_code=self.model.trust_remote_code)

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the merged model."""
        return "AutoModelForSequenceClassification" if self.is_classifier else "AutoModelForCausalLM"

    @cached_property
    def other_base(self) -> MergeBase | None:
        """The base with the weights of ``other_choice``; None where there is none."""
        if self.other_choice is None:
            return None
        quantization = self.source.model.quantization if self.other_choice == "dequantized" else "none"
        model = self.source.model.model_copy(update={"quantization": quantization})
        return open_merge_base(self.base.folder, model, self.adapter.dtype)

    @property
    def other_choice(self) -> BaseChoice | None:
        """What the adapter could have been added to instead; None where the base has one kind of weights only."""
        if self.base_weights == "original":
            return "dequantized" if self.source.model.quantization == "nf4" else None
        stored_in_4_bits = self.base.opened is not None and self.base.opened.stored
        return None if stored_in_4_bits else "original"


def open_conversion(
    source: Source, base_weights: BaseChoice | None, dtype: DtypeChoice, *, allow_pickle: bool = False
) -> Conversion:
    """Open the base and read the adapter. Raises UserError with what does not fit together.

    ``allow_pickle`` lets an adapter from elsewhere have a base in ``.bin`` files; our checkpoints say it themselves.
    """
    folder = _folder_of(source)
    if source.dtype is None:
        source = _completed(source, folder, base_weights, allow_pickle)
    assert source.dtype is not None
    model = _as_chosen(source.model, base_weights)
    base = open_merge_base(folder, model, source.dtype)
    adapter = replace(source.adapter(base.tensors), dtype=source.dtype)
    merged_dtype = source.dtype if dtype == "auto" else getattr(torch, _SHORT_NAMES.get(dtype, dtype))
    return Conversion(source, model, base, adapter, merged_dtype, adapter.config)


def _folder_of(source: Source) -> Path:
    try:
        with naming_setting("--base"):
            return model_folder(source.model.name_or_path, cache_dir(), source.model.revision)
    except UserError as error:
        advice = f"{source.path} names that base; where it is now is said with --base"
        raise UserError([*error.problems, advice]) from error


def _completed(source: Source, folder: Path, base_weights: BaseChoice | None, allow_pickle: bool) -> Source:
    """What an adapter from elsewhere does not say about its training, taken from the base and from the choice.

    Compute dtype: that of the base. NF4 where the base is stored so, or where the user says so (``dequantized``; then
    with double quantization, as QLoRA has it).
    """
    with naming_setting("--base"):
        weights = open_weights(folder, allow_pickle, any_dtype=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    update: dict[str, Any] = {"allow_pickle": allow_pickle}
    if any(".quant_state." in name for name in weights):  # the dtypes of its files are those of the packing
        update |= {"quantization": "nf4", "double_quant": any(name.endswith(".nested_absmax") for name in weights)}
        named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        dtype = getattr(torch, named)
    else:
        _require_plain(folder, config)
        update["quantization"] = "nf4" if base_weights == "dequantized" else "none"
        floating = Counter(tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point)
        dtype = floating.most_common(1)[0][0]
    return replace(source, model=source.model.model_copy(update=update), dtype=dtype)


def _as_chosen(trained_on: ModelSection, base_weights: BaseChoice | None) -> ModelSection:
    if base_weights == "dequantized" and trained_on.quantization == "none":
        raise UserError(
            "--base-weights dequantized: the run was trained on the original weights (model.quantization: none), there "
            "are no others; leave the option out"
        )
    return trained_on.model_copy(update={"quantization": "none"}) if base_weights == "original" else trained_on


def _require_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where the weights are packed in a format that is not read here."""
    if quantization := config.get("quantization_config"):
        raise UserError(
            f"{folder}/config.json: the weights are quantized by {quantization.get('quant_method')!r}; give the folder "
            "of the original weights with --base"
        )
