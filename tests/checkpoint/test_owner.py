"""Who may change a run folder: an old process that wakes up, wherever it slept, changes nothing of the new run's."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.owner import RunFolderLostError, take
from qvtune.checkpoint.state import TrainerState
from qvtune.config.schema import RunConfig
from qvtune.report.metrics import MetricsLog
from qvtune.storage.files import write_json
from qvtune.train import run_folder
from qvtune.train.run_folder import open_run_folder, trajectory_settings

_CHANGES = ("os.rename", "os.mkdir", "os.symlink", "os.remove", "os.rmdir", "shutil.rmtree")


@pytest.fixture(autouse=True)
def _light(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "environment", lambda hosts: {})  # asks git
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug here


def write_run(run_dir: Path, resume: str, mark: str, before_append: Callable[[], None] = lambda: None) -> None:
    """What rank 0 does to a run folder in a run of three steps, with ``mark`` in every file."""
    config = RunConfig.model_validate(
        {"run_dir": str(run_dir), "train": {"max_steps": 3}, "checkpoint": {"resume": resume}}
    )
    _, owner, _ = open_run_folder(config, {"mark": mark}, {})
    assert owner is not None
    with owner.writing() as workspace:
        metrics = MetricsLog(run_dir, workspace)
    trainer = TrainerState(trajectory=trajectory_settings(config))
    for step in (1, 2, 3):

        def write_files(folder: Path) -> None:
            write_json(folder / "trainer_state.json", vars(trainer))
            (folder / "mark.txt").write_text(mark)

        with owner.writing():
            before_append()
            metrics.write("checkpoint", step=step, mark=mark)
        with owner.writing() as workspace:
            checkpoint_folder.write(run_dir / "checkpoints", step, write_files, workspace)
            checkpoint_folder.mark_best(run_dir / "checkpoints", {step: float(step)}, workspace=workspace)
            checkpoint_folder.prune(run_dir / "checkpoints", 1, workspace)
    metrics.close()


class SleepAt:
    """Stops this process, as SIGSTOP does, before its change number ``nth`` of the file system."""

    def __init__(self, nth: int) -> None:
        self.nth, self.count = nth, 0

    def change(self) -> None:
        self.count += 1
        if self.count == self.nth:
            os.kill(os.getpid(), signal.SIGSTOP)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For ``sys.addaudithook``: Python reports every call of the operating system's."""
        writes = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
        if event in _CHANGES or writes:
            self.change()


def start_old_run(run_dir: Path, resume: str, nth: int) -> int:
    """A process that runs ``write_run`` and sleeps at a change; its last words are in ``last_words.txt``."""
    child = os.fork()
    if child == 0:
        os.environ["SLURM_RESTART_COUNT"] = "0"
        sleep = SleepAt(nth)
        sys.addaudithook(sleep.audit)
        code = 0
        try:
            write_run(run_dir, resume, "old", sleep.change)
        except Exception as error:  # noqa: BLE001  # the test looks at what it was
            sleep.nth, code = 0, 1
            (run_dir.parent / "last_words.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(code)
    return child


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files and links below ``folder`` by name."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def sleeps(tmp_path: Path, resume: str) -> Iterator[tuple[int, Path, int]]:
    """For each change that a run makes: its number, a run folder, and the old process, which sleeps before it."""
    for nth in itertools.count(1):
        run_dir = tmp_path / str(nth) / "run"
        write_run(run_dir, resume, "earlier")
        child = start_old_run(run_dir, resume, nth)
        if not os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
            return
        yield nth, run_dir, child


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["if_available", "never"])
def test_whoever_wakes_up_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    num_sleeps = 0
    for nth, run_dir, child in sleeps(tmp_path, resume):
        num_sleeps += 1
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        write_run(run_dir, resume, "new")
        written = snapshot(run_dir)
        os.kill(child, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        last_words = (run_dir.parent / "last_words.txt").read_text() if code else "none"
        assert (code, last_words.split(":")[0]) == (1, "RunFolderLostError"), f"change {nth}: {last_words}"
        assert f"process {os.getpid()} on " in last_words and "(Slurm job 77, restart 1)" in last_words
        assert snapshot(run_dir) == written, f"change {nth}"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert num_sleeps > 40, "every rename, folder, link and file of a run"


def test_a_run_takes_the_folder_from_the_one_before(tmp_path: Path) -> None:
    first = take(tmp_path / "run")
    with first.writing() as workspace:
        assert workspace.is_dir()
    second = take(tmp_path / "run")
    assert (first.generation, second.generation) == (1, 2)
    with pytest.raises(RunFolderLostError, match=r"run now belongs to process \d+ on "), first.writing():
        pytest.fail("the first has lost it")
    second.check()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".owner-00000002"]


def test_who_slept_before_its_claim_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is free again, since two others have come and the first of them has gone."""
    take(tmp_path)
    owners: list[Any] = []
    mkdir = Path.mkdir

    def late_mkdir(path: Path, *arguments: Any, **keywords: Any) -> None:
        if path.name == ".owner-00000002" and not owners:
            owners.append(None)
            owners[:] = [take(tmp_path), take(tmp_path)]
        mkdir(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", late_mkdir)
    with pytest.raises(RunFolderLostError):
        take(tmp_path)
    assert owners[-1].generation == 3
    owners[-1].check()
    assert [path.name for path in tmp_path.iterdir()] == [".owner-00000003"]


def test_a_loss_in_the_middle_of_a_change_is_named(tmp_path: Path) -> None:
    owner = take(tmp_path / "run")

    def change(workspace: Path) -> None:
        take(tmp_path / "run")
        (workspace / "file").write_text("")

    with pytest.raises(RunFolderLostError), owner.writing() as workspace:
        change(workspace)


def test_other_failures_of_a_change_stay_what_they_are(tmp_path: Path) -> None:
    owner = take(tmp_path / "run")
    with pytest.raises(FileNotFoundError), owner.writing():
        (tmp_path / "nowhere" / "file").write_text("")


def test_a_folder_deleted_by_hand_is_not_written_again(tmp_path: Path) -> None:
    """Also when another run has made it again: generation 1, as before."""
    owner = take(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "gone")
    again = take(tmp_path / "run")
    assert again.generation == owner.generation
    with pytest.raises(RunFolderLostError):
        owner.check()


@pytest.mark.parametrize(("job", "restart", "refused"), [("7", "1", True), ("7", "3", False), ("8", "0", False)])
def test_an_earlier_start_of_the_same_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str, refused: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    owner = take(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    if refused:
        with pytest.raises(RunFolderLostError, match=r"Slurm job 7, restart 2"):
            take(tmp_path)
        owner.check()
    else:
        assert take(tmp_path).generation == 2


def test_what_was_set_aside_only_half_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("a", "b"):
        (tmp_path / "run" / name).write_text(name)
    owner = take(tmp_path / "run")
    (owner.workspace / "aside").mkdir()
    os.rename(tmp_path / "run/a", owner.workspace / "aside/a")  # and here the machine dies
    later = take(tmp_path / "run")
    assert later.set_aside() == tmp_path / "run.2"
    assert [snapshot(tmp_path / name) for name in ("run.1", "run.2")] == [{"a": b"a"}, {"b": b"b"}]
    assert later.set_aside() is None
