"""Finding the folder of a model: a path, a hub id, or the embedded one."""

import re
from pathlib import Path

from qvtune.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def model_folder(name_or_path: str, cache_dir: Path, revision: str | None = None) -> Path:
    """The folder of a base model.

    Args:
        name_or_path: a folder; a hub id, which is downloaded into Hugging Face's cache; or ``demo``, the embedded
            SmolLM2-135M, which is converted into ``cache_dir`` at its first use.
        revision: commit, tag or branch of a hub id; None is the newest that the hub has.

    Raises:
        UserError: where there is no such model, or ``revision`` is given with what is no hub id.
    """
    _require_hub_id(name_or_path, revision)
    if name_or_path == "demo":
        from qvtune.embedded.model import demo_model

        return demo_model(cache_dir)
    return _download(name_or_path, revision) if is_hub_id(name_or_path) else _local(name_or_path)


def cached_model_folder(name_or_path: str, cache_dir: Path, revision: str | None = None) -> Path | None:
    """As ``model_folder``, but None where it would convert the embedded model or download one from the hub."""
    _require_hub_id(name_or_path, revision)
    if name_or_path == "demo":
        from qvtune.embedded.model import demo_in_cache

        return demo_in_cache(cache_dir)
    if not is_hub_id(name_or_path):
        return _local(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(name_or_path, revision=revision, allow_patterns=_WANTED_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(found)


def is_hub_id(name_or_path: str) -> bool:
    """Whether a name has the form of a hub id, ``owner/name``, and is no folder or file here."""
    return bool(_HUB_ID.fullmatch(name_or_path)) and not Path(name_or_path).expanduser().exists()


def download_command(hub_id: str, revision: str | None) -> str:
    """What fetches a model of the hub."""
    return f"hf download {hub_id}" + (f" --revision {revision}" if revision is not None else "")


def _require_hub_id(name_or_path: str, revision: str | None) -> None:
    if revision is not None and not is_hub_id(name_or_path):
        raise UserError(
            f"{revision!r} selects a revision of a model on the hub, but model.name_or_path is {name_or_path!r}, which "
            "is not a hub id; remove one of them",
            setting="model.revision",
        )


def _local(name_or_path: str) -> Path:
    folder = Path(name_or_path).expanduser()
    if not (folder / "config.json").is_file():
        what = "is a folder without config.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{name_or_path!r} {what}; give the folder of a Hugging Face model (config.json, tokenizer, "
            "*.safetensors), a hub id like `meta-llama/Llama-3.1-8B`, or `demo`",
        )
    return folder


def _download(hub_id: str, revision: str | None) -> Path:
    """The hub's snapshot in Hugging Face's cache; with HF_HUB_OFFLINE=1 only what is there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise UserError(
            f"{hub_id!r} is no folder here, and the hub cannot deliver it{at} ({_first_line(error)}). On a machine "
            f"with a network run `{download_command(hub_id, revision)}` into the same HF_HOME, or give a folder; a "
            "gated model needs `hf auth login`",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
