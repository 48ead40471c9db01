"""The folder that a merge leaves: everything but the weights, and all of it at once."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qvtune.errors import UserError
from qvtune.files import fsync, write_json


def require_free(output: Path) -> None:
    """Raise UserError where ``output`` is anything but missing or an empty folder."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"--output: {output} is not empty; give a new folder, or delete this one")
    elif output.exists() or output.is_symlink():
        raise UserError(f"--output: {output} is not a folder; give a new folder")


@contextmanager
def model_output(output: Path) -> Iterator[Path]:
    """A private folder beside ``output`` that takes its name when the block ends, and vanishes if it raises."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as private:
        folder = Path(private) / output.name
        folder.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            fsync(path)
        os.rename(folder, output)
    fsync(output.parent)


def write_config(base: Path, folder: Path, dtype: torch.dtype, changes: Mapping[str, Any]) -> None:
    """The base's config.json with ``changes``, for weights that are to be computed with in ``dtype``."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what "dtype" was called before transformers 4.56
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config | changes | {"dtype": str(dtype).removeprefix("torch.")})
