"""A file system that refuses a checkpoint, or a line of the record, and takes it later."""

import errno
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint import state as checkpoint_state
from qvtune.checkpoint.folder import complete_checkpoints, verify
from qvtune.checkpoint.owner import take
from qvtune.checkpoint.state import TrainerState, load_trainer_state
from qvtune.config.schema import RunConfig
from qvtune.errors import StopRequested
from qvtune.report.metrics import MetricsLog
from qvtune.tasks.causal_lm import TASK
from qvtune.train import save
from qvtune.train.save import Saves
from tests.support.lab import flip_a_bit
from tests.support.processes import files_of_at_most

pytestmark = pytest.mark.usefixtures("one_process")


class Training:
    """A run without a model: its state is one matrix of 8,000 bytes, and as much for each of its three moments."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **checkpoint: Any) -> None:
        keys = ("value", "master", "exp_avg", "exp_avg_sq")
        monkeypatch.setattr(save, "gather_state", lambda engine: {"w": {key: torch.ones(40, 50) for key in keys}})
        config = {"run_dir": str(run_dir), "train": {"max_steps": 9}, "checkpoint": checkpoint}
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.state = TrainerState()
        run = SimpleNamespace(
            run_dir=run_dir,
            owner=take(run_dir),
            resume=None,
            state=self.state,
            engine=SimpleNamespace(module=SimpleNamespace(model=None)),
            plan=SimpleNamespace(task=TASK),
            fingerprint={},
        )
        (run_dir / "checkpoints").mkdir()
        self.saves = Saves(
            cast(Any, run),
            RunConfig.model_validate(config),
            lambda event, **fields: self.events.append({"event": event, **fields}),
        )

    def save(self, step: int, **options: Any) -> None:
        """A checkpoint, and what the run does before it stops: wait until it is written."""
        self.begin(step)
        self.saves.finish(self.said.append, **options)

    def begin(self, step: int) -> None:
        self.state.step = step
        self.saves.save(self.said.append)


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "run", monkeypatch)
    checkpoints = tmp_path / "run/checkpoints"
    for step in (1, 2):
        training.save(step)
    with files_of_at_most(4000):
        training.save(3)
    assert not training.saves.is_saved
    message = training.said[-1]
    for part in ("no checkpoint (1 of checkpoint.max_failed_saves=3)", "File too large", "32,000 bytes"):
        assert part in message
    assert "delete step-00000001 there" in message and "step-00000002" not in message, "the newest is needed"
    assert training.events[-1]["event"] == "save_failed"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000001", "step-00000002", "latest"}
    assert (checkpoints / "latest").resolve().name == "step-00000002"

    training.save(4)
    assert training.saves.is_saved
    assert training.events[-1]["event"] == "checkpoint"
    assert [path.name for path in complete_checkpoints(checkpoints)][-1] == "step-00000004"
    for folder in complete_checkpoints(checkpoints):
        verify(folder)


def test_the_run_stops_when_too_many_in_a_row_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path / "run", monkeypatch, max_failed_saves=2)
    with files_of_at_most(4000):
        training.save(1)
    training.save(2)  # so the next failure is again the first
    with files_of_at_most(4000):
        training.save(3)
        with pytest.raises(StopRequested, match="2 checkpoints in a row could not be written"):
            training.save(4)
        training.save(4, is_last=True)  # what is tried before the run leaves
    assert [event["event"] for event in training.events] == ["save_failed", "checkpoint", *["save_failed"] * 3]


def test_lines_of_the_record_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path)
    with files_of_at_most(4000):
        for step in range(100):
            log.write("step", step=step, loss=0.5)
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 4000
    log.write("step", step=100, loss=0.5)
    log.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(101))
    assert "".join(capsys.readouterr()).count("its lines are kept and tried again") == 1


def test_what_is_not_finite_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path / "run", monkeypatch)
    training.save(1)
    monkeypatch.setattr(save, "gather_state", lambda engine: {"w": {"value": torch.full((2, 2), torch.nan)}})
    with pytest.raises(RuntimeError, match=r"step 2 is not saved, 1 problems; earlier checkpoints stay:\nw: value"):
        training.save(2)
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000001"]


class Held:
    """A file system that takes its time: ``folder.write`` waits until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.released, self._error, self._write = threading.Event(), error, checkpoint_folder.write
        monkeypatch.setattr(checkpoint_folder, "write", self._held)

    def _held(self, *arguments: Any) -> int:
        assert self.released.wait(60)
        if self._error is not None:
            raise self._error
        return self._write(*arguments)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state as it was; ``latest``, the record and the next checkpoint wait for it."""
    training, held = Training(tmp_path / "run", monkeypatch), Held(monkeypatch)
    checkpoints = tmp_path / "run/checkpoints"
    training.begin(1)
    training.state.step, training.state.tokens = 2, 99
    training.saves.check(training.said.append)
    assert training.events == [] and training.said == [] and list(checkpoints.iterdir()) == []
    assert not training.saves.is_saved
    threading.Timer(0.5, held.released.set).start()
    training.begin(2)
    training.saves.finish(training.said.append)
    assert training.saves.is_saved
    assert [(event["event"], event["step"]) for event in training.events] == [("checkpoint", 1), ("checkpoint", 2)]
    assert training.events[0]["blocked_seconds"] > 0.3, "the second has waited for the first"
    assert training.events[0]["bytes"] > 3 * 8000
    stored = [load_trainer_state(folder) for folder in complete_checkpoints(checkpoints)]
    assert [(state.step, state.tokens) for state in stored] == [(1, 0), (2, 99)]
    assert (checkpoints / "latest").resolve().name == "step-00000002"


def test_the_best_checkpoint_may_be_the_one_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held = Training(tmp_path / "run", monkeypatch), Held(monkeypatch)
    training.state.evaluations[1] = {"loss": 2.0}
    training.begin(1)
    threading.Timer(0.3, held.released.set).start()
    training.state.evaluations[2] = {"loss": 3.0}
    training.saves.mark_best(training.said.append)
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step-00000001"


def test_where_best_cannot_be_marked_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, mark = Training(tmp_path / "run", monkeypatch), checkpoint_folder.mark_best
    best = tmp_path / "run/checkpoints/best"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training.state.evaluations[1] = {"loss": 2.0}
    training.save(1)
    training.state.evaluations[2] = {"loss": 1.0}
    training.state.step = 2
    monkeypatch.setattr(checkpoint_folder, "mark_best", full)
    training.saves.mark_best(training.said.append)
    assert "step 2: checkpoints/best stays as it was" in training.said[-1] and "No space left" in training.said[-1]
    assert best.resolve().name == "step-00000001"
    monkeypatch.setattr(checkpoint_folder, "mark_best", mark)
    training.save(2)
    assert best.resolve().name == "step-00000002"


def test_a_crash_while_a_checkpoint_is_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, held = Training(tmp_path / "run", monkeypatch), Held(monkeypatch, RuntimeError("a defect"))
    training.begin(1)
    held.released.set()
    with pytest.raises(RuntimeError, match="a defect"):
        training.saves.finish(training.said.append)
    with pytest.raises(RuntimeError, match="a defect"):
        training.saves.check(training.said.append)  # after each step


def test_what_reads_back_otherwise_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, real = Training(tmp_path / "run", monkeypatch), checkpoint_state.save
    training.save(1)

    def save_and_spoil(folder: Path, *arguments: Any) -> None:
        real(folder, *arguments)
        flip_a_bit(folder / "optimizer.safetensors")

    monkeypatch.setattr(checkpoint_state, "save", save_and_spoil)
    training.save(2)
    assert "what was written is not what is read back: exp_avg" in training.said[-1]
    assert not training.saves.is_saved
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-00000001"


def test_a_master_that_is_the_value_itself_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path / "run", monkeypatch)
    training.save(1)
    stored = load_file(tmp_path / "run/checkpoints/latest/optimizer.safetensors")
    assert sorted(stored) == ["exp_avg/w", "exp_avg_sq/w"]
    rounded = {"value": torch.ones(40, 50, dtype=torch.bfloat16)}
    other = {key: torch.ones(40, 50) for key in ("master", "exp_avg", "exp_avg_sq")}
    monkeypatch.setattr(save, "gather_state", lambda engine: {"w": rounded | other})
    training.save(2)
    stored = load_file(tmp_path / "run/checkpoints/latest/optimizer.safetensors")
    assert sorted(stored) == ["exp_avg/w", "exp_avg_sq/w", "master/w"]
