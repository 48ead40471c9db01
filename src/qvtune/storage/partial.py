"""A model folder that is made file by file: private while it grows, kept when it is cut off, whole at once.

.NAME.partial/model/         beside the output: files that are complete, under their final names
             /progress.json  what they were made from, and their checksums
"""

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvtune.errors import UserError, naming_setting
from qvtune.storage.atomic import atomic_file, publish
from qvtune.storage.files import write_json
from qvtune.storage.writer import FilePlans, WrittenFile, checksum_of

_SETTING = "--output"
_PROGRESS, _LOCK, _MODEL = "progress.json", "lock", "model"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class KeptError(UserError):
    """What has been written stays, and the next start goes on."""


class DiskFullError(KeptError):
    """There is no room."""


@naming_setting(_SETTING)
def require_free(output: Path) -> None:
    """Raise UserError where ``output`` is anything but missing or an empty folder."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"{output} is not empty; give a new folder, or delete this one")
    elif output.exists() or output.is_symlink():
        raise UserError(f"{output} is not a folder; give a new folder")


@dataclass(frozen=True)
class PartialOutput:
    """A folder that may have been begun before. ``notes`` of finished files are whatever ``write`` was told."""

    root: Path
    progress: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the model's files go."""
        return self.root / _MODEL

    def notes(self) -> Iterator[Any]:
        """Those of the files that an earlier start has finished."""
        return (entry["notes"] for entry in self.progress["files"].values())

    def write(self, file: str, write: Callable[[Path], WrittenFile], notes: Callable[[], Any]) -> None:
        """Make one file, unless it is there; afterwards it counts as finished, with what ``notes()`` then gives."""
        if file not in self.progress["files"]:
            written = write(self.folder / file)
            self.progress["files"][file] = {**vars(written), "notes": notes()}
            self.save()

    def save(self) -> None:
        """Put the progress on the disk."""
        with atomic_file(self.root / _PROGRESS) as private:
            write_json(private, self.progress)

    @naming_setting(_SETTING)
    def require_room(self, files: FilePlans) -> None:
        """Raises DiskFullError where the files that are missing do not fit, before any of them is begun."""
        needed = sum(
            plan.num_bytes for file, plans in files.items() if file not in self.progress["files"] for plan in plans
        )
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise DiskFullError(
                f"{needed / 1e9:.1f} GB are needed in {self.root.parent}, {free / 1e9:.1f} GB are free; make "
                "room and start again, or give a folder elsewhere"
            )


@contextmanager
def partial_output(output: Path, made_from: Any) -> Iterator[PartialOutput]:
    """A private folder beside ``output`` that takes its place when the block ends.

    ``made_from`` (JSON) is all that decides the files' bytes. A start with the same value goes on with the files that
    an earlier one has finished; one with another is refused. A UserError from the block removes the folder, since
    another start would end the same; a KeptError and anything else (a full disk, an interrupt, a crash) leaves it.
    """
    root = output.parent / f".{output.name}.partial"
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as lock:
        _lock(lock.fileno(), root)
        partial = _open(root, hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest())
        try:
            yield partial
            publish(partial.folder, output)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DiskFullError(_full(root, error), setting=_SETTING) from error
        except KeptError:
            raise
        except UserError:
            shutil.rmtree(root)
            raise
        shutil.rmtree(root)


@naming_setting(_SETTING)
def _lock(descriptor: int, root: Path) -> None:
    """Held until the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is writing it, in {root}; wait for it, or end it") from error


@naming_setting(_SETTING)
def _open(root: Path, identity: str) -> PartialOutput:
    """What an earlier start has left, verified; everything that it had not finished is gone."""
    partial = PartialOutput(root, {"identity": identity, "files": {}})
    partial.folder.mkdir(exist_ok=True)
    if (root / _PROGRESS).exists():
        partial = PartialOutput(root, json.loads((root / _PROGRESS).read_text(encoding="utf-8")))
        if partial.progress["identity"] != identity:
            raise UserError(
                f"{root} holds unfinished work on another checkpoint or base, or with other settings; "
                "repeat that command to finish it, or delete the folder to start anew"
            )
        _require_undamaged(partial)
    for path in partial.folder.iterdir():
        if path.name not in partial.progress["files"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return partial


def _require_undamaged(partial: PartialOutput) -> None:
    problems = []
    for file, entry in partial.progress["files"].items():
        path = partial.folder / file
        expected = WrittenFile(entry["num_bytes"], entry["checksum"])
        if not path.is_file() or checksum_of(path) != expected:
            problems.append(f"{path} is missing or not what was written; delete {partial.root} to start anew")
    if problems:
        raise UserError(problems)


def _full(root: Path, error: OSError) -> str:
    return f"{error.strerror} in {root.parent}; make room and repeat the command, which goes on where it was"
