"""The checkpoint folder: written whole or not at all, checked before it is used, readable by PEFT as it is.

checkpoints/step-00000020/   adapter_model.safetensors  adapter_config.json   the adapter, as PEFT has it; or, where
                             trained.safetensors        matrices of the base are trained, these under the base's names
                             optimizer.safetensors      AdamW moments by parameter name, and fp32 masters where they
                                                        differ from the values above
                             trainer_state.json         step, counters, the settings that made the trajectory
                             base.json                  fingerprint of the base, tensor by tensor
                             manifest.json              size and sha256 of each file above
checkpoints/latest           symbolic link to the newest complete one
checkpoints/step-00000040.damaged   one whose files were no longer those of its manifest when a run resumed
checkpoints/best             symbolic link to the one with the best evaluation, by the metric of the task

``workspace`` is where a folder lies before it appears and after it was taken away: a hidden place on the same file
system, by default ``checkpoints`` itself. See qvtune/checkpoint/owner.py for what it protects from.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder, discard
from qvtune.storage.files import fsync, sha256, write_json

_STEP_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    """``checkpoints/step-00000020``."""
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All checkpoints, oldest first. A name without a manifest cannot occur: the folder appears by one rename."""
    found = [path for path in checkpoints.glob("step-*") if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name)


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = complete_checkpoints(checkpoints)
    return found[-1] if found else None


def write(checkpoints: Path, step: int, write_files: Callable[[Path], None], workspace: Path | None = None) -> int:
    """Write one checkpoint: the files of ``write_files``, their manifest, the link ``latest``. Returns its bytes.

    A crash at any moment leaves either the complete folder or a hidden one that ``remove_unfinished`` deletes. A
    checkpoint of the same step, written before a resume from an older one, is replaced.
    """
    target = step_folder(checkpoints, step)
    with atomic_folder(target, if_taken="replace", workspace=workspace) as private:
        write_files(private)
        manifest: dict[str, dict[str, Any]] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(private.iterdir())
        }
        write_json(private / MANIFEST, manifest)
    _point("latest", target, workspace or checkpoints)
    return sum(int(entry["bytes"]) for entry in manifest.values())


def mark_best(
    checkpoints: Path, values: Mapping[int, float], higher_is_better: bool = False, workspace: Path | None = None
) -> None:
    """Let ``best`` point to the checkpoint with the best of these values by step; of equal ones the first."""
    evaluated = {
        folder: values[step] for folder in complete_checkpoints(checkpoints) if (step := _step_of(folder)) in values
    }
    if evaluated:
        best = (max if higher_is_better else min)(evaluated, key=evaluated.__getitem__)
        _point("best", best, workspace or checkpoints)


def prune(checkpoints: Path, keep: int, workspace: Path | None = None) -> None:
    """Delete all but the best checkpoint and the newest ``keep`` besides it."""
    best = (checkpoints / "best").resolve().name
    for folder in [path for path in complete_checkpoints(checkpoints) if path.name != best][:-keep]:
        discard(folder, workspace or checkpoints)


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what a crash while writing or deleting has left."""
    for folder in checkpoints.glob(".step-*"):
        shutil.rmtree(folder)


def newest_whole(checkpoints: Path, verified: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are those of its manifest, or None; what is wrong with each newer one.

    ``verified`` is one that need not be looked at again.
    """
    problems: list[str] = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if folder == verified or not (found := _differences(folder)):
            return folder, problems
        problems += found
    return None, problems


def set_damaged_aside(checkpoints: Path, whole: Path, workspace: Path | None = None) -> list[Path]:
    """Rename the checkpoints that are newer than ``whole`` to ``step-*.damaged``; returns where they are now.

    ``latest`` then points to ``whole``, and ``best`` is gone if it pointed to one of them: it is found again from the
    evaluations when the next checkpoint is written.
    """
    aside = []
    for folder in complete_checkpoints(checkpoints):
        if folder.name > whole.name:
            names = (f"{folder.name}.damaged{number}" for number in chain([""], (f".{n}" for n in count(2))))
            free = next(path for name in names if not (path := checkpoints / name).exists())
            os.rename(folder, free)
            aside.append(free)
    if aside:
        _point("latest", whole, workspace or checkpoints)
        if not (checkpoints / "best").exists():
            (checkpoints / "best").unlink(missing_ok=True)
    return aside


def resolve(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, ``latest`` or ``best``, or a run folder (its newest).

    Raises UserError when there is none.
    """
    if (path / MANIFEST).is_file():
        return path.resolve()
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise UserError(
            f"{path}: no checkpoint; give a folder runs/NAME/checkpoints/step-* or a run folder that has one"
        )
    return found.resolve()


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises UserError listing all that differ."""
    if problems := _differences(folder):
        raise UserError([*problems, f"{folder} is damaged; delete it to use the checkpoint before it"])


def _differences(folder: Path) -> list[str]:
    """How the files of a checkpoint differ from its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST}: cannot be read ({error})"]
    problems = []
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{path}: the content is not what was written (sha256)")
    return problems


def _step_of(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def _point(name: str, target: Path, workspace: Path) -> None:
    """Let the link ``name`` beside ``target`` point to it."""
    link = workspace / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    os.replace(link, target.parent / name)
    fsync(target.parent)
