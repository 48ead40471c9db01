"""Versions of the packages that determine a run's result, and the commit of this source."""

import importlib.metadata
import subprocess
from pathlib import Path

PACKAGES = (
    "qvtune",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "flash-attn",
    "safetensors",
    "numpy",
)
COMMIT_FILE = "COMMIT"  # in the copy of the source that launch/submit.py makes, which is no git repository


def repository() -> Path:
    """The checkout this package runs from (it is installed with ``pip install -e``)."""
    return Path(__file__).parents[2]


def installed() -> dict[str, str | None]:
    """Version of each package of ``PACKAGES``; None where it is not installed."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The source's commit, with ``-dirty`` when files differ from it; None outside a repository."""
    frozen = repository() / COMMIT_FILE
    if frozen.is_file():  # git could find another repository around the run folder
        return frozen.read_text(encoding="utf-8").strip() or None
    described = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None if described.returncode == 0 else None
