"""Merges that are cut off: nothing half-made looks complete, and the next start ends with the same bytes."""

import fcntl
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvtune.convert.convert import convert
from qvtune.convert.merge import write
from qvtune.distributed.command import run_alone
from qvtune.errors import UserError
from qvtune.storage.partial import DiskFullError
from tests.convert.conftest import MakeRun
from tests.support.tiny import make_model_folder

SMALL = 20_000  # bytes of a file: several of them


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which says how long it took; the card without the folder's name."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.pop("merge_report.json")
    return found | {"README.md": found["README.md"].replace(folder.name.encode(), b"NAME")}


def updates(folder: Path) -> list[object]:
    report: dict[str, list[object]] = json.loads((folder / "merge_report.json").read_text())
    return report["updates"]


def in_fork(action: Callable[[], object]) -> int:
    """Exit code of a child that does ``action``: what takes seconds to import is there already."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(action() or 0))  # type: ignore[call-overload]
        finally:
            os._exit(70)  # behind an exception
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def merge_and_die(run: Path, output: Path, number: int) -> None:
    """Killed in the midst of write ``number``."""
    pwrite, done = os.pwrite, 0

    def dying(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal done
        done += 1
        if done > number:
            pwrite(descriptor, data[: len(data) // 2], position)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(descriptor, data, position)

    os.pwrite = dying  # type: ignore[assignment]
    convert(run, output, max_shard_bytes=SMALL)


def merge_with_small_files_only(run: Path, output: Path, limit: int) -> int:
    """As on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return run_alone(lambda: convert(run, output, max_shard_bytes=SMALL))


def test_killed_at_any_write_the_next_start_ends_with_the_same_bytes(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(llama_folder)
    convert(run, tmp_path / "straight", max_shard_bytes=SMALL)
    output = tmp_path / "killed"
    finished = []
    for number in (0, 9, 23):  # each goes on where the one before was
        assert in_fork(partial(merge_and_die, run, output, number)) == -signal.SIGKILL
        assert not output.exists()
        (private,) = tmp_path.glob(".killed*")
        assert not (private / "model" / "config.json").exists()
        progress = private / "progress.json"
        finished.append(len(json.loads(progress.read_text())["files"]) if progress.exists() else 0)
    assert finished == sorted(finished) and finished[-1] > 0
    written: list[str] = []
    write_file = write.write_file

    def noting(path: Path, **rest: object) -> object:
        written.append(path.name)
        return write_file(path, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_file", noting)
    convert(run, output, max_shard_bytes=SMALL)
    assert contents(output) == contents(tmp_path / "straight")
    assert updates(output) == updates(tmp_path / "straight")
    assert len(written) == len(list(output.glob("*.safetensors"))) - finished[-1]
    assert not list(tmp_path.glob(".killed*"))


def test_killed_from_outside_at_a_random_moment(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder)
    convert(run, tmp_path / "straight", max_shard_bytes=SMALL)
    output = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        convert(run, output, max_shard_bytes=SMALL)
        os._exit(0)
    time.sleep(int.from_bytes(os.urandom(1)) / 256)  # a merge takes about a second
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not output.exists():  # else it was faster
        convert(run, output, max_shard_bytes=SMALL)
    assert contents(output) == contents(tmp_path / "straight")


def test_a_full_disk_is_said_and_the_next_start_goes_on(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(llama_folder)
    convert(run, tmp_path / "straight", max_shard_bytes=SMALL)
    output = tmp_path / "full"
    sizes = [file.stat().st_size for file in sorted((tmp_path / "straight").glob("*.safetensors"))]
    assert sizes[0] < max(sizes)
    assert in_fork(partial(merge_with_small_files_only, run, output, max(sizes) - 1)) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "error: --output: File too large" in message
    assert "goes on where it was" in message
    assert "Traceback" not in message
    assert not output.exists()
    assert json.loads((tmp_path / ".full.partial" / "progress.json").read_text())["files"]
    convert(run, output, max_shard_bytes=SMALL)
    assert contents(output) == contents(tmp_path / "straight")


def test_too_little_room_is_said_before_anything_is_written(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(write, "write_file", lambda *_, **__: pytest.fail("began to write"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000, "total": usage.f_blocks})())
    with pytest.raises(DiskFullError, match=r"0\.0 GB are needed in .*, 0\.0 GB are free"):
        convert(make_run(llama_folder), tmp_path / "merged")


def interrupted(run: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """All weights are written, nothing behind them."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "qvtune.convert.formats.merged.write_companions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            convert(run, output, max_shard_bytes=SMALL, **options)  # type: ignore[arg-type]


def test_other_settings_or_another_base_do_not_go_on_where_one_stopped(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model_folder(tmp_path / "base")
    run, output = make_run(base), tmp_path / "merged"
    interrupted(run, output, monkeypatch)
    assert not output.exists()
    other = r"unfinished work on another checkpoint or base, or with other settings"
    with pytest.raises(UserError, match=other):
        convert(run, output, max_shard_bytes=SMALL, dtype="bfloat16")
    with pytest.raises(UserError, match=other):
        convert(run, output, max_shard_bytes=SMALL, base_weights="original")
    with pytest.raises(UserError, match=other):
        convert(run, output, max_shard_bytes=SMALL + 1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=other):
        convert(run, output, max_shard_bytes=SMALL)


def test_a_file_that_was_damaged_meanwhile_is_refused(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = make_run(llama_folder), tmp_path / "merged"
    interrupted(run, output, monkeypatch)
    file = sorted((tmp_path / ".merged.partial" / "model").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name} is missing or not what was written; delete"):
        convert(run, output, max_shard_bytes=SMALL)


def test_two_at_once_do_not_write_into_each_other(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run, output = make_run(llama_folder), tmp_path / "merged"
    (tmp_path / ".merged.partial").mkdir()
    with (tmp_path / ".merged.partial" / "lock").open("w") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            convert(run, output)
    convert(run, output)


@pytest.mark.parametrize("base_weights", ["dequantized", "original"])
def test_threads_and_rows_at_a_time_do_not_change_a_byte(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, base_weights: str
) -> None:
    run = make_run(llama_folder)
    for num_threads in (1, 3):
        convert(run, tmp_path / f"by-{num_threads}", num_threads=num_threads, base_weights=base_weights)  # type: ignore[arg-type]
    assert contents(tmp_path / "by-1") == contents(tmp_path / "by-3")


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_at_a_time_agree_with_the_whole_matrix(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    run = make_run(llama_folder)
    whole = convert(run, tmp_path / "whole")
    monkeypatch.setattr("qvtune.convert.merge.tensors.COMPUTED", rows * 64 + 13)
    monkeypatch.setattr("qvtune.convert.merge.tensors.COPIED", 1000)
    parts = convert(run, tmp_path / "parts")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
    for left, right in zip(whole.updates, parts.updates, strict=True):
        assert right.update_norm == pytest.approx(left.update_norm, rel=1e-5)
