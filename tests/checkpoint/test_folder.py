"""The checkpoint folder: all or nothing, at whatever moment the machine dies."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.folder import (
    complete_checkpoints,
    newest,
    prune,
    remove_unfinished,
    resolve,
    step_folder,
    verify,
    write,
)
from qvtune.errors import UserError
from tests.support.processes import killed


def files(**content: str) -> Callable[[Path], None]:
    def write_files(folder: Path) -> None:
        for name, text in content.items():
            (folder / f"{name}.txt").write_text(text)

    return write_files


def crash(*arguments: Any, **keywords: Any) -> Never:
    """The process ends here."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_checkpoint_is_complete(tmp_path: Path) -> None:
    size = write(tmp_path / "run/checkpoints", 20, files(a="four", b="sixsix"))
    folder = tmp_path / "run/checkpoints/step-00000020"
    assert size == 10
    assert names(folder) == ["a.txt", "b.txt", "manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    # sha256sum of the four letters
    assert manifest["a.txt"] == {
        "bytes": 4,
        "sha256": "04efaf080f5a3e74e1c29d1ca6a48569382cbbcd324e8d59d2b83ef21c039f00",
    }
    assert manifest.keys() == {"a.txt", "b.txt"}
    assert folder.stat().st_mode & 0o777 == 0o755, "mkdtemp's folders are private; this one is to be read by others"
    verify(folder)


def test_latest_names_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step, files(a="text"))
        assert os.readlink(tmp_path / "latest") == f"step-{step:08d}", "relative: the run folder can be moved"
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (1, 2, 10)]
    assert newest(tmp_path) == step_folder(tmp_path, 10)


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert newest(tmp_path) is None


def die_while_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def write_half(folder: Path) -> None:
        (folder / "a.txt").write_text("hal")
        crash()

    return write_half


def die_before_the_rename(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    monkeypatch.setattr(os, "rename", crash)
    return files(a="second")


def die_in_fsync(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    monkeypatch.setattr(os, "fsync", crash)
    return files(a="second")


@pytest.mark.parametrize("die", [die_while_writing, die_before_the_rename, die_in_fsync])
def test_a_crash_leaves_the_checkpoints_before_and_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die: Callable[[pytest.MonkeyPatch], Callable[[Path], None]]
) -> None:
    write(tmp_path, 1, files(a="first"))
    assert killed(lambda: write(tmp_path, 2, die(monkeypatch)))
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, 1)]
    assert os.readlink(tmp_path / "latest") == "step-00000001"
    assert len(names(tmp_path)) == 3
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]
    verify(step_folder(tmp_path, 1))


def test_a_crash_between_rename_and_latest_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, files(a="first"))

    def write_and_die() -> None:
        monkeypatch.setattr(os, "replace", crash)
        write(tmp_path, 2, files(a="second"))

    assert killed(write_and_die)
    assert newest(tmp_path) == step_folder(tmp_path, 2), "what is resumed does not hang on the link"
    verify(step_folder(tmp_path, 2))
    write(tmp_path, 3, files(a="third"))
    assert os.readlink(tmp_path / "latest") == "step-00000003"


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert set(synced) == {"a.txt", "b.txt", "manifest.json", source.name}
        real_rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write(tmp_path, 1, files(a="1", b="2"))
    assert synced == [tmp_path.name] * 2, "and the new names after it: of the checkpoint, and of the link"


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("hal")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "run" / "checkpoints", 1, fail)
    assert names(tmp_path / "run" / "checkpoints") == []


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 5, files(a="old", gone="old"))
    write(tmp_path, 5, files(a="new"))
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert names(tmp_path / "latest") == ["a.txt", "manifest.json"]
    assert (tmp_path / "latest/a.txt").read_text() == "new"
    verify(step_folder(tmp_path, 5))


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step, files(a="text"))
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000010"]
    prune(tmp_path, keep=5)
    assert len(complete_checkpoints(tmp_path)) == 2


def test_best_has_the_lowest_evaluation_loss_and_stays(tmp_path: Path) -> None:
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}
    for step in range(1, 9):
        write(tmp_path, step, files(a="text"))
        checkpoint_folder.mark_best(tmp_path, {key: loss for key, loss in losses.items() if key <= step})
        prune(tmp_path, keep=2)
    assert os.readlink(tmp_path / "best") == "step-00000004", "of equal losses the first; relative, as latest is"
    assert names(tmp_path) == ["best", "latest", "step-00000004", "step-00000007", "step-00000008"]
    assert resolve(tmp_path / "best") == step_folder(tmp_path.resolve(), 4)
    assert newest(tmp_path) == step_folder(tmp_path, 8)
    write(tmp_path, 9, files(a="text"))
    checkpoint_folder.mark_best(tmp_path, losses | {9: 0.5})
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["best", "latest", "step-00000007", "step-00000008", "step-00000009"]


def test_best_follows_the_direction_of_the_metric(tmp_path: Path) -> None:
    accuracies = {1: 0.5, 2: 0.75, 3: 0.75, 4: 0.25}
    for step in accuracies:
        write(tmp_path, step, files(a="text"))
    checkpoint_folder.mark_best(tmp_path, accuracies, higher_is_better=True)
    assert os.readlink(tmp_path / "best") == "step-00000002"
    checkpoint_folder.mark_best(tmp_path, accuracies, higher_is_better=False)
    assert os.readlink(tmp_path / "best") == "step-00000004"


def test_a_checkpoint_without_an_evaluation_is_not_the_best(tmp_path: Path) -> None:
    write(tmp_path, 1, files(a="text"))
    checkpoint_folder.mark_best(tmp_path, {0: 1.0, 2: 0.5})
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_a_crash_while_pruning_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write(tmp_path, step, files(a="text"))

    def prune_and_die() -> None:
        monkeypatch.setattr("shutil.rmtree", crash)
        prune(tmp_path, keep=1)

    assert killed(prune_and_die)
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, 2)]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_remove_unfinished_where_there_is_nothing(tmp_path: Path) -> None:
    remove_unfinished(tmp_path / "nothing")


def test_verify_lists_all_damage(tmp_path: Path) -> None:
    write(tmp_path, 1, files(whole="text", missing="text", short="text", changed="text"))
    folder = step_folder(tmp_path, 1)
    (folder / "missing.txt").unlink()
    (folder / "short.txt").write_text("tex")
    (folder / "changed.txt").write_text("tixt")
    with pytest.raises(UserError) as caught:
        verify(folder)
    *damage, advice = caught.value.problems
    assert sorted(damage) == [
        f"{folder}/changed.txt: the content is not what was written (sha256)",
        f"{folder}/missing.txt: missing",
        f"{folder}/short.txt: 3 bytes, 4 were written",
    ]
    assert "delete it to use the checkpoint before it" in advice


@pytest.mark.parametrize("manifest", [None, "", "{"])
def test_verify_without_a_manifest_that_can_be_read(tmp_path: Path, manifest: str | None) -> None:
    write(tmp_path, 1, files(a="text"))
    (step_folder(tmp_path, 1) / "manifest.json").unlink()
    if manifest is not None:
        (step_folder(tmp_path, 1) / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify(step_folder(tmp_path, 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("run", 2),
        ("run/checkpoints", 2),
        ("run/checkpoints/latest", 2),
        ("run/checkpoints/step-00000001", 1),
    ],
)
def test_resolve_finds_what_a_person_means(tmp_path: Path, given: str, expected: int) -> None:
    for step in (1, 2):
        write(tmp_path / "run/checkpoints", step, files(a="text"))
    assert resolve(tmp_path / given) == step_folder(tmp_path.resolve() / "run/checkpoints", expected)


@pytest.mark.parametrize("given", ["nothing", ""])
def test_resolve_says_what_it_wants(tmp_path: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"no checkpoint; give a folder runs/NAME/checkpoints/step-\* or a run folder"):
        resolve(tmp_path / given)
