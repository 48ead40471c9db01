"""Checks of the run folder's file system: space, speed, rename, clock, and whether all nodes share it."""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qvtune.doctor.findings import Finding
from qvtune.storage.files import fsync

_PROBE_BYTES = 64 << 20
_SLOW = 20e6  # bytes per second: a checkpoint of 1 GB would block training for almost a minute
_CLOCK_SECONDS = 5.0
_HIDDEN = ".doctor-"


def probe_folder(run_dir: Path, job: str) -> Path:
    """The folder for the probe files of all nodes of a job: in the run folder, else in its nearest existing parent."""
    run_dir = run_dir.absolute()
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    return existing / f"{_HIDDEN}{job}"


def check_storage(folder: Path, node: int, checkpoint_bytes: int, keep: int) -> tuple[list[Finding], float | None]:
    """Write and rename files in ``folder``, measure, and leave a marker file for the other nodes.

    Returns the findings, and the seconds that this node's clock is ahead of the file system's (None if unknown).
    Space is needed for ``keep`` checkpoints, one that is being written, and the best.
    """
    findings: list[Finding] = []
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
        findings.append(_check_space(folder, free, checkpoint_bytes * (keep + 2)))
        (folder / f"marker-{node}").touch()
        findings.append(_check_speed(folder / f"speed-{node}", free))
        findings.append(_check_rename(folder, node))
        offset = _clock_offset(folder / f"clock-{node}")
    except OSError as error:
        remedy = "free space, quota (df, quota) and permissions of run_dir; or another run_dir"
        detail = f"{folder.parent}: cannot be written: {error.strerror}"
        return [*findings, Finding("run folder", "fail", detail, remedy)], None
    return [*findings, _check_file_clock(offset)], offset


def _check_space(folder: Path, free: int, needed: int) -> Finding:
    detail = f"{free / 1e9:.2f} GB free at {folder.parent}, checkpoints take {needed / 1e9:.2f} GB"
    if free > needed:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "delete old runs, lower checkpoint.keep, or move run_dir")


def _check_speed(path: Path, free: int) -> Finding:
    """Write with fsync. Reading is not measured: it would come from the page cache."""
    content = os.urandom(max(1, min(_PROBE_BYTES, free // 8)))  # other nodes write at the same time
    started = time.monotonic()
    path.write_bytes(content)
    fsync(path)
    speed = len(content) / max(time.monotonic() - started, 1e-6)
    path.unlink()
    detail = f"{speed / 1e6:.0f} MB/s written at {path.parent.parent} ({_file_system(path.parent)})"
    if speed >= _SLOW:
        return Finding("file speed", "ok", detail)
    return Finding(
        "file speed",
        "note",
        detail,
        "each checkpoint will block training for long; use a faster file system for run_dir",
    )


def _check_rename(folder: Path, node: int) -> Finding:
    """Whether renaming a folder and replacing a link are atomic, as checkpoints require."""
    temporary, target = folder / f"rename-{node}.new", folder / f"rename-{node}"
    temporary.mkdir()
    (temporary / "file").write_text("complete")
    os.rename(temporary, target)
    complete = (target / "file").read_text() == "complete" and not temporary.exists()
    (folder / f"link-{node}.new").symlink_to("a")
    os.replace(folder / f"link-{node}.new", folder / f"link-{node}")
    shutil.rmtree(target)
    if complete and (folder / f"link-{node}").is_symlink():
        return Finding("rename", "ok", "atomic for folders and links")
    return Finding(
        "rename", "fail", "a renamed folder was not complete under its new name", "use a POSIX file system for run_dir"
    )


def _clock_offset(path: Path) -> float:
    """Seconds that this node's clock is ahead of the clock of the file system's time stamps."""
    before = time.time()
    path.write_text("now")
    fsync(path)
    return (before + time.time()) / 2 - path.stat().st_mtime


def _check_file_clock(offset: float) -> Finding:
    detail = f"this node's clock is {offset:+.1f} s from the file system's"
    if abs(offset) <= _CLOCK_SECONDS:
        return Finding("clock", "ok", detail)
    return Finding("clock", "fail", detail, "chronyc tracking (or timedatectl) on this node; start its time service")


def _file_system(path: Path) -> str:
    """File system type of the mount that contains ``path``."""
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        mount = fields.split()[4]
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, tail.split()[0])
    return best[1]


def visible_markers(folder: Path, node: int, expected: Iterable[int], seconds: float) -> list[int]:
    """The nodes whose marker files are visible here. Returns when all ``expected`` are, or after ``seconds``.

    An NFS client caches the entries of a folder for up to a minute; changing the folder invalidates its cache.
    """
    deadline = time.monotonic() + seconds
    wanted = {f"marker-{other}": other for other in expected}
    while True:
        poke = folder / f"poke-{node}"
        with suppress(OSError):  # no such folder: then no marker is visible, which is the result
            poke.touch()
            poke.unlink()
        seen = sorted(other for name, other in wanted.items() if (folder / name).exists())
        if len(seen) == len(wanted) or time.monotonic() > deadline:
            return seen
        time.sleep(0.2)


def remove_probes(folder: Path) -> None:
    """Delete the folder; another node may do so at the same time."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
