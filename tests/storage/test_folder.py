from pathlib import Path

import pytest

from qvtune.storage.folder import new_folder


def test_the_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as private:
        (private / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


def test_after_an_exception_nothing_is_there(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_folder(tmp_path / "folder") as private:
            (private / "file").write_text("content")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with new_folder(target) as late:
        (late / "file").write_text("late")
        with new_folder(target) as early:
            (early / "file").write_text("early")
    assert (target / "file").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]
