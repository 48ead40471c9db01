"""What a server needs beside the weights, and how vLLM is started: tokenizer, chat template and ends as in training."""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvtune.convert.conversion import Conversion
from qvtune.convert.sources.peft_config import PeftConfig
from qvtune.model.companions import copy_companions
from qvtune.storage.files import write_json

GENERATION = "generation_config.json"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_TEMPLATES = ("chat_template.*", "additional_chat_templates")  # where there is none, an older file's would be used
_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all that vLLM's --max-lora-rank may be


def write_companions(conversion: Conversion, folder: Path) -> None:
    """Tokenizer, chat template and generation settings of training, model code and licences of the base."""
    copy_companions(conversion.base.folder, folder)
    if conversion.tokenizer_folder != conversion.base.folder:
        for pattern in _TEMPLATES:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for pattern in (*_TOKENIZER, *_TEMPLATES):
            for path in conversion.tokenizer_folder.glob(pattern):
                copy: Any = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, folder / path.name)
    if not conversion.is_classifier:
        _write_generation(conversion, folder / GENERATION)


def _write_generation(conversion: Conversion, path: Path) -> None:
    """The base's settings, with all of ``end_tokens``."""
    ends, is_there = end_tokens(conversion), path.is_file()
    settings = json.loads(path.read_text(encoding="utf-8")) if is_there else {}
    if not is_there:
        config = json.loads((conversion.base.folder / "config.json").read_text(encoding="utf-8"))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: config[name] for name in names if config.get(name) is not None}
    named = settings.get("eos_token_id")
    if not is_there or ends != (named if isinstance(named, list) else [named]):
        settings["eos_token_id"] = ends if len(ends) != 1 else ends[0]
        write_json(path, settings)


def end_tokens(conversion: Conversion) -> list[int]:
    """Ids of the tokens that end an answer: first those that the base names, then what training ends answers with.

    A base whose chat template ends turns with another token than its texts (Qwen2.5's base models, say) names the
    latter alone; a server would then go on behind the end of every answer.
    """
    from qvtune.data.chat import ChatTemplate

    folder, tokenizer = conversion.base.folder, conversion.tokenizer
    named: Any = None
    for file in (folder / "config.json", folder / GENERATION):  # the latter decides
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", named) if file.is_file() else named
    trained = [tokenizer.eos_token_id]
    if tokenizer.chat_template and (end := ChatTemplate(tokenizer).end_of_answer()) is not None:
        trained.append(tokenizer.convert_tokens_to_ids(end))
    known = [*(named if isinstance(named, list) else [named]), *trained]
    return list(dict.fromkeys(token for token in known if token is not None))


def vllm_serve(options: Mapping[str, Any], *more: str) -> str:
    """The command for the card, from the options of vLLM's engine, whose names are those of the command."""
    words = ["vllm", "serve", options["model"], *more]
    for name, value in options.items():
        if name != "model":
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return f"```\n{shlex.join(words)}\n```"


def vllm_options(conversion: Conversion, model: str) -> dict[str, Any]:
    """Of the engine. With a dtype, since vLLM takes float16 for weights in float32."""
    trusted = {"trust_remote_code": True} if conversion.model.trust_remote_code else {}
    return {"model": model, "dtype": str(conversion.dtype).removeprefix("torch."), **trusted}


def vllm_problems(config: PeftConfig) -> Iterator[str]:
    """Why vLLM does not serve this adapter; what it does not know it refuses, or passes over in silence."""
    if config.is_ia3:
        yield "it is (IA)^3, not LoRA"
    if config.get("use_dora"):
        yield "it is DoRA"
    if config.get("bias") not in (None, "none"):
        yield "it has biases"
    for setting in ("modules_to_save", "trainable_token_indices"):
        if config.get(setting):
            yield f"it has {setting}"
    if _largest_rank(config) > _MAX_LORA_RANKS[-1]:
        yield f"its rank is above {_MAX_LORA_RANKS[-1]}"


def max_lora_rank(config: PeftConfig) -> int:
    """The smallest value of ``--max-lora-rank`` with room for this adapter."""
    return next(rank for rank in _MAX_LORA_RANKS if rank >= _largest_rank(config))


def _largest_rank(config: PeftConfig) -> int:
    ranks: list[int] = [config.get("r") or 1, *(config.get("rank_pattern") or {}).values()]
    return max(ranks)


def python_code(how_to_load: str) -> str:
    """What stands in a card's block of Python."""
    return how_to_load.removeprefix("```python\n").removesuffix("\n```")
