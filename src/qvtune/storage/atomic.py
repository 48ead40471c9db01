"""Files and folders that are either complete or not there: written under a private name, then renamed once.

Before the rename the content is on the disk and readable for the group and others (some libraries make private files);
after it the new name is on the disk too. A process that dies leaves at most something called ``.NAME-RANDOM``.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qvtune.storage.files import fsync

IfTaken = Literal["error", "keep", "replace"]


@contextmanager
def atomic_file(target: Path, *, workspace: Path | None = None) -> Iterator[Path]:
    """Yield a private path; what the block writes there becomes ``target``, in place of an earlier file.

    When the block fails nothing is left. The private file is made in ``workspace``, a folder on the same file system,
    by default that of ``target``.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=workspace or target.parent)
    os.close(descriptor)
    private = Path(name)
    try:
        yield private
        _share_and_flush(private)
        os.replace(private, target)
        fsync(target.parent)
    finally:
        private.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, if_taken: IfTaken = "error", workspace: Path | None = None) -> Iterator[Path]:
    """Yield a private empty folder that becomes ``target`` when the block ends without an exception.

    When the block fails nothing is left. ``if_taken``: see ``publish``. The private folder is made in ``workspace``,
    a folder on the same file system, by default that of ``target``, which is created.
    """
    if workspace is None:
        workspace = target.parent
        workspace.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=workspace))
    try:
        yield private
        publish(private, target, if_taken=if_taken, workspace=workspace)
    finally:
        shutil.rmtree(private, ignore_errors=True)  # after the rename there is none


def publish(private: Path, target: Path, *, if_taken: IfTaken = "error", workspace: Path | None = None) -> None:
    """Rename the folder ``private`` to ``target``, its content being on the disk and readable for all.

    Where ``target`` is a folder with content: ``error`` raises OSError; ``keep`` leaves both as they are, for folders
    that are named by their content, so that the two are the same; ``replace`` deletes the earlier one, by way of
    ``workspace``.
    """
    for path in [*private.rglob("*"), private]:
        _share_and_flush(path)
    if if_taken == "replace" and target.exists():
        discard(target, workspace or target.parent)
    try:
        os.rename(private, target)
    except OSError:
        if if_taken != "keep" or not target.is_dir():
            raise
    fsync(target.parent)


def discard(folder: Path, workspace: Path) -> None:
    """Delete ``folder`` so that it never looks complete meanwhile: it is first renamed into ``workspace``."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=workspace))
    os.rename(folder, doomed / folder.name)
    shutil.rmtree(doomed)


def _share_and_flush(path: Path) -> None:
    """Let others read ``path`` (0644, folders 0755, no permission is taken away), and wait for the disk."""
    if not path.is_symlink():
        path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o755 if path.is_dir() else 0o644))
        fsync(path)
