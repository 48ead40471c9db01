"""Who may change a run folder: the run that took it last.

A rank can live on after its job was started again elsewhere (its node's slurmd died, the network was away, it hung in
a file system), and then write where the new run writes. So each run that opens the folder takes it: it makes
``run_dir/.owner-00000002/TOKEN/``, its workspace, and removes the one before. A run prepares everything in its
workspace and publishes it by a rename out of it; what it deletes it first renames into it. Without a workspace these
renames fail, whenever the stale run wakes up: there is no gap between a check and an act. The token makes a workspace's
path unique, also where the run folder was moved aside or deleted by hand.

On NFS a client may still know the handle of a folder that another has renamed. Therefore the workspace is emptied and
deleted as well: the source of such a rename is gone, and a deleted folder as its target is ESTALE.
"""

import itertools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvtune.storage.atomic import atomic_file
from qvtune.storage.files import write_json

_PREFIX, _IDENTITY, _ASIDE = ".owner-", "owner.json", "aside"


class RunFolderLostError(RuntimeError):
    """Another run has taken the run folder; this one must end, without collectives, as its peers may be gone."""


@dataclass(frozen=True)
class Owner:
    """The right to change ``run_dir``, for one process, until another run takes it."""

    run_dir: Path
    generation: int
    workspace: Path

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yields the workspace for a change of the run folder. Raises RunFolderLostError, before or instead of it."""
        self.check()
        try:
            yield self.workspace
        except OSError:
            self.check()
            raise

    def set_aside(self, keep: Collection[str] = ()) -> Path | None:
        """Move what an earlier run has left to ``run_dir.1``, ``.2``, ...; None where there is nothing.

        The names in ``keep`` stay. Entry by entry through the workspace: renaming ``run_dir`` could hit what a newer
        run has made of it.
        """
        left = [path for path in self.run_dir.iterdir() if not path.name.startswith(_PREFIX) and path.name not in keep]
        if not left:
            return None
        with self.writing() as workspace:
            (workspace / _ASIDE).mkdir()
            for path in left:
                os.rename(path, workspace / _ASIDE / path.name)
            aside = _free_name(self.run_dir)
            os.rename(workspace / _ASIDE, aside)
        return aside

    def check(self) -> None:
        """Raises RunFolderLostError, naming the new owner, when the folder has been taken."""
        if not self.workspace.is_dir():
            raise RunFolderLostError(_lost(self.run_dir))


def take(run_dir: Path) -> Owner:
    """Make this process the owner of ``run_dir``, which is created where it does not exist.

    Of runs that do this at the same time one remains. Raises RunFolderLostError for the others, and where the owner is
    a later start of the same Slurm job.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    identity = _own_identity()
    while True:
        earlier = _generations(run_dir)
        if earlier and _is_later_start(_identity(earlier[-1]), identity):
            raise RunFolderLostError(_lost(run_dir))
        generation = 1 + (_number(earlier[-1]) if earlier else 0)
        folder = run_dir / f"{_PREFIX}{generation:08d}"
        try:
            folder.mkdir()
        except FileExistsError:  # taken meanwhile: the later one stays
            continue
        break
    owner = Owner(run_dir, generation, folder / secrets.token_hex(8))
    try:
        owner.workspace.mkdir()
        with atomic_file(folder / _IDENTITY, workspace=owner.workspace) as private:
            write_json(private, identity)
    except FileNotFoundError as error:
        raise RunFolderLostError(_lost(run_dir)) from error
    if _generations(run_dir)[-1] != folder:  # this process slept before it made its folder
        _remove(folder)
        raise RunFolderLostError(_lost(run_dir))
    for old in [*earlier, *run_dir.glob(f"{_PREFIX}*.ended")]:
        _remove(old)
    return owner


def _generations(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _remove(folder: Path) -> None:
    """End an owner. The rename comes first: after it nothing can appear in the folder by its path."""
    ended = folder.with_name(f"{_PREFIX}{secrets.token_hex(8)}.ended")
    try:
        os.rename(folder, ended)
    except FileNotFoundError:  # another run, which takes the folder as well, was faster
        return
    for unfinished in ended.glob(f"*/{_ASIDE}"):  # interrupted in ``set_aside``
        os.rename(unfinished, _free_name(folder.parent))
    shutil.rmtree(ended, onerror=_unless_gone)


def _free_name(run_dir: Path) -> Path:
    return next(path for n in itertools.count(1) if not (path := run_dir.with_name(f"{run_dir.name}.{n}")).exists())


def _unless_gone(function: Any, path: str, raised: Any) -> None:
    """The old owner may just be deleting the same files."""
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def _own_identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "time": time.time(),
    }


def _identity(folder: Path) -> dict[str, Any]:
    """What an owner has written about itself; empty where it was interrupted before."""
    path = folder / _IDENTITY
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return stored


def _is_later_start(found: dict[str, Any], own: dict[str, Any]) -> bool:
    same_job = own["slurm_job"] is not None and found.get("slurm_job") == own["slurm_job"]
    return same_job and bool(found["slurm_restart"] > own["slurm_restart"])


def _lost(run_dir: Path) -> str:
    folders = _generations(run_dir) if run_dir.is_dir() else []
    owner = _identity(folders[-1]) if folders else {}
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another run"
    if owner.get("slurm_job"):
        who += f" (Slurm job {owner['slurm_job']}, restart {owner['slurm_restart']})"
    return f"{run_dir} now belongs to {who}; this run ends and has changed nothing there since"
