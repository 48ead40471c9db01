"""Files and folders that are complete or not there."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qvtune.storage.atomic import atomic_file, atomic_folder, discard
from tests.support.processes import killed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(target: Path, text: str = "content", **options: object) -> None:
    with atomic_folder(target, **options) as private:  # type: ignore[arg-type]
        (private / "inner").mkdir()
        (private / "inner" / "file").write_text(text)


def write_file(target: Path, text: str = "content", **options: object) -> None:
    with atomic_file(target, **options) as private:  # type: ignore[arg-type]
        private.write_text(text)


def test_the_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with atomic_folder(target) as private:
        (private / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert names(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")])
def test_after_an_exception_nothing_is_there(tmp_path: Path, error: BaseException) -> None:
    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "folder") as private, atomic_file(tmp_path / "file") as file:
            file.write_text("content")
            (private / "file").write_text("content")
            raise error

    with pytest.raises(type(error), match="half-way"):
        fail_half_way()
    assert names(tmp_path) == []


def test_of_two_writers_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target, if_taken="keep") as late:
        (late / "file").write_text("late")
        with atomic_folder(target, if_taken="keep") as early:
            (early / "file").write_text("early")
    assert (target / "file").read_text() == "early"
    assert names(tmp_path) == ["folder"]


def test_keeping_is_no_excuse_for_another_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "folder", if_taken="keep")
    assert names(tmp_path) == ["folder"]


def test_a_taken_name_is_an_error_unless_said_otherwise(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "first")
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path / "folder", "second")
    assert (tmp_path / "folder/inner/file").read_text() == "first"
    write_folder(tmp_path / "folder", "third", if_taken="replace")
    assert (tmp_path / "folder/inner/file").read_text() == "third"
    assert names(tmp_path) == ["folder"]


def test_an_empty_folder_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_folder(tmp_path / "folder")
    assert (tmp_path / "folder/inner/file").read_text() == "content"


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_the_private_place_can_be_chosen(tmp_path: Path, write: Callable[..., None]) -> None:
    workspace = tmp_path / "workspace"
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "there", workspace=workspace)
    assert names(tmp_path) == [], "a workspace that was taken away is not made again"
    workspace.mkdir()
    write(tmp_path / "there", workspace=workspace)
    assert names(tmp_path) == ["there", "workspace"] and names(workspace) == []


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_file(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert names(tmp_path) == ["file"]


def test_others_can_read_and_what_was_allowed_still_is(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as private:
        (private / "inner").mkdir(mode=0o700)
        for name, mode in (("private", 0o600), ("script", 0o770)):
            (private / name).touch()
            (private / name).chmod(mode)
        (private / "link").symlink_to("nowhere")
    write_file(tmp_path / "file")
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert found == {"folder": 0o755, "inner": 0o755, "private": 0o644, "script": 0o774, "file": 0o644}
    assert os.readlink(tmp_path / "folder/link") == "nowhere"


class Disk:
    """What has been flushed, by name, at each rename."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.before_rename: list[set[str]] = []
        self._fsync, self._renames = os.fsync, {"rename": os.rename, "replace": os.replace}
        monkeypatch.setattr(os, "fsync", self.fsync)
        for name in self._renames:
            monkeypatch.setattr(os, name, lambda source, target, name=name: self.rename(name, source, target))

    def fsync(self, descriptor: int) -> None:
        self.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        self._fsync(descriptor)

    def rename(self, function: str, source: Path, target: Path) -> None:
        self.before_rename.append({name.partition("-")[0] for name in self.synced})
        self.synced.clear()
        self._renames[function](source, target)


def test_all_of_a_folder_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_folder(tmp_path / "folder")
    assert disk.before_rename == [{"file", "inner", ".folder"}]
    assert disk.synced == [tmp_path.name], "and the new name after it"


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_file(tmp_path / "file")
    assert disk.before_rename == [{".file"}]
    assert disk.synced == [tmp_path.name]


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("function", ["fsync", "rename", "replace"])
def test_a_process_that_dies_leaves_nothing_by_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, write: Callable[..., None]
) -> None:
    def write_and_die() -> None:
        monkeypatch.setattr(os, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write(tmp_path / "target")

    if killed(write_and_die):
        [left] = names(tmp_path)
        assert left.startswith(".target-")
    else:
        assert (write, function) in ((write_file, "rename"), (write_folder, "replace")), "the one that is not used"


def test_what_is_discarded_never_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workspace").mkdir()
    write_folder(tmp_path / "folder")

    def discard_and_die() -> None:
        monkeypatch.setattr("shutil.rmtree", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        discard(tmp_path / "folder", tmp_path / "workspace")

    assert killed(discard_and_die)
    assert names(tmp_path) == ["workspace"]
