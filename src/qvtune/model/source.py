"""Finding the folder of a model: a path, a hub id, or the embedded one."""

import re
from pathlib import Path

from qvtune.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def model_folder(name_or_path: str, cache_dir: Path) -> Path:
    """The folder of a base model; ``demo`` = the embedded SmolLM2-135M, converted into the cache at its first use."""
    if name_or_path == "demo":
        from qvtune.embedded.model import demo_model

        return demo_model(cache_dir)
    folder = Path(name_or_path).expanduser()
    if _is_hub_id(name_or_path):
        return _download(name_or_path)
    if not (folder / "config.json").is_file():
        what = "is a folder without config.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"model.name_or_path: {name_or_path!r} {what}; give the folder of a Hugging Face model "
            "(config.json, tokenizer, *.safetensors), a hub id like `meta-llama/Llama-3.1-8B`, or `demo`"
        )
    return folder


def cached_model_folder(name_or_path: str, cache_dir: Path) -> Path | None:
    """As ``model_folder``, but None where it would convert the embedded model or download one from the hub."""
    if name_or_path == "demo":
        from qvtune.embedded.model import demo_in_cache

        return demo_in_cache(cache_dir)
    if not _is_hub_id(name_or_path):
        return model_folder(name_or_path, cache_dir)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=_WANTED_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_hub_id(name_or_path: str) -> bool:
    return bool(_HUB_ID.fullmatch(name_or_path)) and not Path(name_or_path).expanduser().exists()


def _download(hub_id: str) -> Path:
    """The hub's snapshot in Hugging Face's cache; with HF_HUB_OFFLINE=1 only what is there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"model.name_or_path: {hub_id!r} is no folder here, and the hub cannot deliver it ({_first_line(error)}). "
            f"On a machine with a network run `hf download {hub_id}` into the same HF_HOME, or give a folder; a gated "
            "model needs `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
