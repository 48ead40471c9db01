"""Folders that are either there and complete, or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a private empty folder that becomes ``target`` when the block ends without an exception.

    Files are on the disk before ``target`` appears. Where another process made ``target`` meanwhile, its folder
    stays and this one is removed: callers name folders by their content, so the two are the same.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield private
        private.chmod(0o755)  # mkdtemp makes it readable by its owner alone; caches are shared
        _flush_files(private)
        _rename_unless_there(private, target)
    finally:
        shutil.rmtree(private, ignore_errors=True)  # already gone after the rename


def _flush_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _rename_unless_there(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():
            raise
