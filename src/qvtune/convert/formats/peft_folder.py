"""``adapter``: a clean PEFT folder, with the names that today's PEFT gives, and nothing that only training needs.

PEFT itself says how the tensors are called: it is asked on the base's architecture without its weights, and reads the
folder there, so that a name that it does not know, which it would pass over in silence, cannot be written.
"""

import math
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from qvtune.config.outputs import BaseChoice, ReaderName
from qvtune.convert.conversion import Conversion
from qvtune.convert.merge.write import Written, require_base
from qvtune.convert.proof.layers import skeleton
from qvtune.convert.proof.proof import EXACT, Limits
from qvtune.convert.proof.views import ModelView, ModelViews, adapted_base
from qvtune.convert.serving import (
    max_lora_rank,
    python_code,
    vllm_options,
    vllm_problems,
    vllm_serve,
    write_companions,
)
from qvtune.convert.sources.names import plain_keys
from qvtune.convert.sources.peft_config import CONFIG, WEIGHTS
from qvtune.convert.sources.source import SavedAdapter, open_source
from qvtune.errors import ProofError, UserError
from qvtune.model.adapters import is_of_head
from qvtune.model.fingerprint import ContentChecksums
from qvtune.model.head import HEADS, POOLER
from qvtune.storage.files import write_json
from qvtune.storage.partial import PartialOutput

PREFERS: BaseChoice | None = None
_CHUNK_BYTES = 2**24
_RELATIVE = 1e-6  # of a scaling: PEFT computes it in its own order


def require(conversion: Conversion) -> None:
    """Raises UserError for a full-parameter checkpoint, and for a dtype other than the adapter's own."""
    if conversion.source.saved is None:
        raise UserError(
            f"--format adapter: {conversion.source.path} holds matrices that were trained themselves (adapter.method: "
            "full), which are no adapter; use --format merged"
        )
    if conversion.dtype != conversion.adapter.dtype:
        raise UserError(
            "--dtype: an adapter keeps the dtype it was saved in; leave the option out for --format adapter"
        )


def write(partial: PartialOutput, conversion: Conversion, max_shard_bytes: int, num_threads: int) -> Written:
    """As ``OutputFormat``; small enough to be written in one go."""
    saved = _saved(conversion)
    if conversion.source.fingerprint is not None:
        require_base(conversion, _checksums_of_base(conversion))
    config = _config(saved)
    model: Any = peft.get_peft_model(_empty_base(conversion), config, low_cpu_mem_usage=True)
    given, names = plain_keys(saved.tensors), _todays_names(model)
    if unknown := sorted(given.keys() - names.keys()):
        raise UserError([f"{saved.where}: PEFT {peft.__version__} has no place for {name}" for name in unknown])
    contiguous = {
        names[plain]: given[plain].detach().clone(memory_format=torch.contiguous_format) for plain in sorted(given)
    }
    save_file(contiguous, partial.folder / WEIGHTS, metadata={"format": "pt"})
    write_companions(conversion, partial.folder)
    write_json(partial.folder / CONFIG, _as_json(config) | _base_of(conversion))
    num_bytes = sum(tensor.nbytes for tensor in contiguous.values())
    return Written([WEIGHTS], num_bytes, dict.fromkeys(contiguous, "adapter"), [])


def views(conversion: Conversion, folder: Path) -> ModelViews:
    """Base + adapter as given, and as read from ``folder``, both on the chosen weights."""
    _require_peft_reads(conversion, folder)
    adapter = open_source(folder, base=str(conversion.base.folder)).adapter(conversion.base.tensors)
    given = adapted_base(conversion.base, conversion.adapter)
    written = adapted_base(conversion.base, replace(adapter, dtype=conversion.adapter.dtype))
    return ModelViews(ModelView(given.names, given.read), given, given, written, other=None)


def limits(conversion: Conversion) -> Limits:
    """The same factors on the same weights."""
    return EXACT


def how_to_load(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``; the base in training's dtype, and in 4 bits where its folder does not say so.

    transformers quantizes what it has cast before, training what is stored: hence a dtype that holds both. A head that
    was trained must have its size, and not be quantized.
    """
    dtype, imports, four_bits, option = conversion.dtype, [conversion.auto_class], "", ""
    if _quantizes_in_flight(conversion):
        stored = (conversion.base.weights[name].dtype for name in conversion.base.quantized)
        dtype = reduce(torch.promote_types, stored, conversion.dtype)
        imports, option = [conversion.auto_class, "BitsAndBytesConfig"], ", quantization_config=nf4"
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": conversion.model.double_quant,
            "bnb_4bit_compute_dtype": _name(conversion.dtype),
        }
        if head := _head_modules(conversion):
            settings["llm_int8_skip_modules"] = head
        lines = "".join(f"    {name}={value!r},\n" for name, value in settings.items())
        four_bits = f"nf4 = BitsAndBytesConfig(\n{lines})\n"
    for name, value in _classifier_options(conversion).items():
        option += f", {name}={value!r}"
    if conversion.model.revision is not None:
        option = f', revision="{conversion.model.revision}"{option}'
    ends = ""
    if not conversion.is_classifier:
        imports.append("GenerationConfig")
        ends = f'model.generation_config = GenerationConfig.from_pretrained("{title}")\n'
    return f"""```python
from peft import PeftModel
from transformers import {", ".join(["AutoTokenizer", *imports])}

{four_bits}base = {conversion.auto_class}.from_pretrained("{_base_name(conversion)}", dtype="{_name(dtype)}"{option})
model = PeftModel.from_pretrained(base, "{title}")
{ends}tokenizer = AutoTokenizer.from_pretrained("{title}")
```"""


def how_to_serve(conversion: Conversion, title: str) -> str:
    """As ``OutputFormat``."""
    if problem := _not_served(conversion):
        return problem
    return vllm_serve(_vllm_options(conversion, title), "--lora-modules", f"{title}={title}")


def arguments(reader: ReaderName, conversion: Conversion, folder: str) -> dict[str, Any]:
    """As ``OutputFormat``."""
    if reader == "vllm":
        if problem := _not_served(conversion):
            raise UserError(problem, "--check-with")
        return {"options": _vllm_options(conversion, folder), "adapter": folder}
    return {"code": python_code(how_to_load(conversion, folder))}


def _not_served(conversion: Conversion) -> str | None:
    problems = list(vllm_problems(_saved(conversion).config))
    if conversion.is_classifier:
        problems.append("it is a classifier")
    if not problems:
        return None
    return f"vLLM does not serve this adapter: {'; '.join(problems)}. Serve what `--format merged` writes."


def _vllm_options(conversion: Conversion, folder: str) -> dict[str, Any]:
    """Tokenizer and generation settings from ``folder``, the base in NF4 where it was trained so."""
    options = vllm_options(conversion, _base_name(conversion))
    options |= {"tokenizer": folder, "generation_config": folder}
    options |= {"enable_lora": True, "max_lora_rank": max_lora_rank(_saved(conversion).config)}
    if _quantizes_in_flight(conversion):
        options["quantization"] = "bitsandbytes"
    if conversion.model.revision is not None:
        options["revision"] = conversion.model.revision
    return options


def _quantizes_in_flight(conversion: Conversion) -> bool:
    """Whether the adapter's base is NF4 and its folder is not, so that whoever loads it has to quantize it."""
    return conversion.base.opened is not None and not conversion.base.opened.stored


def _head_modules(conversion: Conversion) -> list[str]:
    """Paths of the modules of a classifier's head that were trained."""
    parts = (*HEADS, POOLER)
    names = [name.split(".") for name in plain_keys(_saved(conversion).tensors) if is_of_head(name)]
    return sorted({".".join(name[: 1 + next(at for at, part in enumerate(name) if part in parts)]) for name in names})


def _classifier_options(conversion: Conversion) -> dict[str, int]:
    """What ``from_pretrained`` has to know of a classifier that the base's config.json does not say."""
    if not conversion.is_classifier or "id2label" not in conversion.settings:
        return {}
    options = {"num_labels": len(conversion.settings["id2label"])}
    return options | {key: conversion.settings[key] for key in ("pad_token_id",) if key in conversion.settings}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _todays_names(model: Any) -> dict[str, str]:
    """Plain name -> name in a file, for all that PEFT saves: always, or where embeddings were resized."""
    saved: dict[str, str] = {}
    for with_embeddings in (True, False):  # the former has names of wrappers too, which are not for files
        names = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
        saved |= plain_keys({name: name for name in names})
    return saved


def _saved(conversion: Conversion) -> SavedAdapter:
    assert conversion.source.saved is not None, "require was not asked"
    return conversion.source.saved


def _base_of(conversion: Conversion) -> dict[str, str | None]:
    """PEFT's settings that name the base."""
    return {"base_model_name_or_path": _base_name(conversion), "revision": conversion.model.revision}


def _base_name(conversion: Conversion) -> str:
    """What ``from_pretrained`` finds wherever it is called: a hub id, or the whole path of a folder."""
    name = conversion.model.name_or_path
    return str(conversion.base.folder.resolve()) if name == "demo" or Path(name).exists() else name


def _config(saved: SavedAdapter) -> peft.PeftConfig:
    """For use: how training initialised the factors does not matter any more, and could be an error elsewhere."""
    values = {key: value for key, value in saved.config.values.items() if value is not None}
    values |= {"inference_mode": True, "init_lora_weights": True}
    for of_training in ("eva_config", "corda_config", "loftq_config", "lora_ga_config", "auto_mapping"):
        values.pop(of_training, None)
    kind: Any = peft.IA3Config if saved.config.is_ia3 else peft.LoraConfig
    known = {field.name for field in fields(kind)}  # what is not, was checked to have no effect
    config: peft.PeftConfig = kind(**{key: value for key, value in values.items() if key in known - {"peft_type"}})
    return config


def _as_json(config: peft.PeftConfig) -> dict[str, Any]:
    """Every setting, by name; PEFT's sets in an order that does not change from one start to the next."""
    values = config.to_dict()
    return {name: sorted(values[name]) if isinstance(values[name], set) else values[name] for name in sorted(values)}


def _empty_base(conversion: Conversion) -> Any:
    """The model that was adapted: unlike the merged one its embeddings are still tied where the base's are.

    Its weights are one zero each: PEFT moves what it loads to the device of the base, where meta would lose it.
    """
    settings = {name: value for name, value in conversion.settings.items() if name != "tie_word_embeddings"}
    model = skeleton(conversion.base.folder, settings, conversion.model.trust_remote_code)
    for name, parameter in list(model.named_parameters()):
        module, _, kind = name.rpartition(".")
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(model.get_submodule(module), kind, nn.Parameter(zeros, requires_grad=False))
    model.tie_weights()
    return model


def _checksums_of_base(conversion: Conversion) -> ContentChecksums:
    """Those of the whole base, of which ``_CHUNK_BYTES`` are in memory at a time."""
    weights = conversion.base.weights
    checksums = ContentChecksums(weights)
    for name, tensor in weights.items():
        for start in range(0, tensor.num_bytes, _CHUNK_BYTES):
            data = weights.read_bytes(name, start, min(start + _CHUNK_BYTES, tensor.num_bytes))
            checksums.add(name, data, start)
    return checksums


def _require_peft_reads(conversion: Conversion, folder: Path) -> None:
    """Raises ProofError where PEFT, loading ``folder``, does not have every given value in its place, and no other."""
    model: Any = peft.PeftModel.from_pretrained(
        _empty_base(conversion), folder, low_cpu_mem_usage=True, torch_device="cpu"
    )
    loaded, file = get_peft_model_state_dict(model, save_embedding_layers=True), load_file(folder / WEIGHTS)
    given = plain_keys(_saved(conversion).tensors)
    by_plain_name = plain_keys({name: name for name in file})
    problems = [f"{name} is written, but was not given" for name in sorted(by_plain_name.keys() - given.keys())]
    for plain, tensor in given.items():
        found = loaded.get(by_plain_name.get(plain, ""))
        if found is None or found.is_meta or not torch.equal(found.to(tensor.dtype), tensor):
            problems.append(f"{plain} is not what PEFT has after loading the folder")
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            expected = _saved(conversion).config.scaling(path.removeprefix("base_model.model."))
            if not math.isclose(module.scaling["default"], expected, rel_tol=_RELATIVE):
                problems.append(f"{path}: PEFT scales by {module.scaling['default']}, training did by {expected}")
    if problems:
        raise ProofError([f"{folder}: {problem}" for problem in problems])
