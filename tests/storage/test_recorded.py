"""A checksum from a record, and every reason not to trust one."""

import hashlib
import os
from pathlib import Path

import pytest

from qvtune.storage import recorded
from qvtune.storage.recorded import recorded_sha256

LONG_AGO = 1_600_000_000


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has not changed for a while: the clock is ahead, as its ctime cannot be set."""
    monkeypatch.setattr(recorded.time, "time", lambda: 2e10)
    path = tmp_path / "rows.jsonl"
    path.write_text("first")
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def unread(path: Path) -> str:
    raise AssertionError(f"{path} was read")


def test_an_unchanged_file_is_read_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded_sha256(path, tmp_path / "records") == of("first")
    monkeypatch.setattr(recorded, "sha256", unread)
    assert recorded_sha256(path, tmp_path / "records") == of("first")
    (tmp_path / "link").symlink_to(path)
    assert recorded_sha256(tmp_path / "link", tmp_path / "records") == of("first")


@pytest.mark.parametrize("change", ["content of the same length and time", "another file in its place", "longer"])
def test_a_changed_file_is_read_again(path: Path, tmp_path: Path, change: str) -> None:
    recorded_sha256(path, tmp_path / "records")
    if change == "another file in its place":
        (tmp_path / "other").write_text("other")
        os.utime(tmp_path / "other", (LONG_AGO, LONG_AGO))
        (tmp_path / "other").rename(path)
    else:
        path.write_text("other" if "same length" in change else "longer")
        os.utime(path, (LONG_AGO, LONG_AGO))
    assert recorded_sha256(path, tmp_path / "records") == of(path.read_text())


def test_of_a_file_that_has_just_changed_no_record_is_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert recorded_sha256(path, tmp_path / "records") == of("first")
    assert not (tmp_path / "records").exists()


def test_of_a_file_that_changes_while_it_is_read_no_record_is_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(path: Path) -> str:
        path.write_text("second")
        return of("first")

    monkeypatch.setattr(recorded, "sha256", changing)
    recorded_sha256(path, tmp_path / "records")
    assert not (tmp_path / "records").exists()
