"""What trackers get, whatever happens to them and to the run."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qvtune.config.report import ReportSection
from qvtune.errors import UserError
from qvtune.report import send
from qvtune.report.followers import followers
from qvtune.report.history import METRICS
from qvtune.report.send import Sender, keep_sending
from qvtune.report.trackers.tracker import point_of, require_trackers
from tests.report.runs import append, events, step, wait_for, write_run
from tests.report.stand_in import Memory, Server, serving, write_package


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    tracker = Memory()
    monkeypatch.setattr(send, "open_tracker", tracker.open)
    return tracker


def sender(run_dir: Path) -> Sender:
    return Sender("mlflow", run_dir, "a project")


def steps(memory: Memory, name: str = "step/loss") -> list[int]:
    return [point.step for point in memory.points if name in point.numbers]


def test_numbers_have_their_paths() -> None:
    entry = {"event": "eval", "time": 7.0, "step": 3, "loss": 2.25, "sets": {"a": {"loss": 2.25}, "b": {"loss": 3}}}
    point = point_of({**entry, "answers": [{"answer": "yes"}], "name": "text"}, 5)
    assert (point.line, point.time, point.step) == (5, 7.0, 3)
    assert point.numbers == {"eval/loss": 2.25, "eval/sets/a/loss": 2.25, "eval/sets/b/loss": 3}
    assert point_of(step(1, 0.0), 0).numbers["step/lr/v"] == pytest.approx(4e-3, rel=0.01)


def test_every_event_is_sent_once_by_several_starts(tmp_path: Path, memory: Memory) -> None:
    run_dir = write_run(tmp_path / "run", events(4, every=2, is_complete=False))
    first = sender(run_dir)
    first.send(is_last=False)
    assert steps(memory) == [1, 2, 3, 4] and steps(memory, "eval/loss") == [0, 2, 4]
    append(run_dir, step(5, 0.0))
    first.send(is_last=True)
    assert steps(memory) == [1, 2, 3, 4, 5] and memory.closed == [None]
    del first
    append(run_dir, *events(8, 5, every=2))
    sender(run_dir).send(is_last=True)
    assert steps(memory) == list(range(1, 9)) and steps(memory, "eval/loss") == [0, 2, 4, 6, 8]
    assert [point.line for point in memory.points] == sorted({point.line for point in memory.points})
    assert memory.closed == [None, "completed"]
    before, after = memory.opened
    assert before.key == after.key and before.project == "a project" and before.config["adapter.rank"] == 16
    assert (before.last_step, after.last_step) == (-1, 5)


def test_steps_that_are_run_again_are_sent_once(tmp_path: Path, memory: Memory) -> None:
    """Killed after step 7, resumed from step 4."""
    run_dir = write_run(tmp_path / "run", events(7, every=2, is_complete=False), events(10, 4, every=2))
    sender(run_dir).send(is_last=True)
    assert steps(memory) == list(range(1, 11)) and memory.forgotten == []


def test_where_a_tracker_forgets_the_last_run_of_a_step_counts(tmp_path: Path, memory: Memory) -> None:
    memory.forgets = True
    run_dir = write_run(tmp_path / "run", events(7, every=2, is_complete=False), events(10, 4, every=2))
    sender(run_dir).send(is_last=True)
    assert steps(memory) == [*range(1, 8), *range(5, 11)] and memory.forgotten == [0, 4]
    assert steps(memory, "eval/loss") == [0, 2, 4, 6, 6, 8, 10]


@pytest.mark.parametrize(("confirms", "again"), [(True, 5), (False, 1)])
def test_after_a_failure_only_what_is_not_confirmed_is_sent_again(
    tmp_path: Path, memory: Memory, confirms: bool, again: int
) -> None:
    memory.confirms = confirms
    run_dir = write_run(tmp_path / "run", events(4, is_complete=False))
    one = sender(run_dir)
    one.send(is_last=False)
    append(run_dir, step(5, 0.0), step(6, 0.0))
    memory.fails_after = 5
    for _ in range(3):
        with pytest.raises(ConnectionError):
            one.send(is_last=False)
    memory.fails_after = None
    memory.points.clear()
    one.send(is_last=False)
    assert steps(memory) == list(range(again, 7))
    assert len({run.key for run in memory.opened}) == 1


def test_a_failure_is_said_once_and_tried_again_ever_more_seldom(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = write_run(tmp_path / "run", events(4, is_complete=False))
    memory.fails_after, waits, said = 0, [], []

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            memory.fails_after = 0 if len(waits) < 8 else None
            if len(waits) == 9:
                self.set()
            return self.is_set()

    assert keep_sending(sender(run_dir), Ended(), said.append)
    assert said == ["ConnectionError: no route to the tracker"]
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300, 2]
    assert steps(memory) == [1, 2, 3, 4]


def test_what_has_not_arrived_at_the_end_is_known(tmp_path: Path, memory: Memory) -> None:
    run_dir = write_run(tmp_path / "run", events(4))
    ended, memory.fails_after = threading.Event(), 0
    ended.set()
    assert not keep_sending(sender(run_dir), ended, lambda text: None)
    memory.fails_after = None
    assert keep_sending(sender(run_dir), ended, lambda text: None)
    assert steps(memory) == [1, 2, 3, 4]


def test_nothing_of_a_run_that_took_the_folder_is_sent_to_the_run_before(tmp_path: Path, memory: Memory) -> None:
    run_dir = write_run(tmp_path / "run", events(4, is_complete=False))
    old = sender(run_dir)
    old.send(is_last=False)
    (run_dir / "new").write_text(json.dumps(step(99, 0.0)) + "\n")
    (run_dir / "new").replace(run_dir / METRICS)
    ended = threading.Event()
    assert keep_sending(old, ended, lambda text: None)
    assert steps(memory) == [1, 2, 3, 4]


def test_there_is_one_sender_of_a_run_at_a_time(tmp_path: Path, memory: Memory) -> None:
    run_dir = write_run(tmp_path / "run", events(4))
    first = sender(run_dir)
    with pytest.raises(UserError, match="is being sent to mlflow by its run"):
        Sender("mlflow", run_dir, "a project", waits=False)
    Sender("wandb", run_dir, "a project", waits=False)
    del first
    Sender("mlflow", run_dir, "a project", waits=False)


def test_packages_that_are_missing_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_trackers(ReportSection(trackers=()))
    with pytest.raises(UserError) as raised:
        require_trackers(ReportSection(trackers=("wandb", "mlflow")))
    first, second = raised.value.problems
    assert "report.trackers: wandb" in first and "pip install wandb" in first and "pip install mlflow" in second


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


TENSORBOARD = ReportSection(html=False)


def test_tensorboard_gets_the_numbers_while_the_run_goes_on(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", events(4, every=4, is_complete=False))
    with followers(run_dir, TENSORBOARD):
        wait_for(lambda: (run_dir / "tensorboard").exists() and "step/loss" in scalars(run_dir))
        append(run_dir, step(5, 0.0, loss=0.5))
    found = scalars(run_dir)
    assert found["step/loss"][-1] == (5, 0.5) and [number for number, _ in found["step/lr/v"]] == [1, 2, 3, 4, 5]
    assert [number for number, _ in found["eval/token_accuracy"]] == [0, 4]
    assert not {"checkpoint/bytes", "step/time", "run_start/step"} & found.keys()


def test_of_steps_that_are_run_again_tensorboard_shows_the_last(tmp_path: Path) -> None:
    """Killed after step 5; two starts later all of it is there once."""
    run_dir = write_run(tmp_path / "run", events(5, is_complete=False))
    with followers(run_dir, TENSORBOARD):
        pass
    again = [{**entry, "loss": 9.0} if entry["event"] == "step" else entry for entry in events(8, 3, is_complete=False)]
    append(run_dir, *again)
    with followers(run_dir, TENSORBOARD):
        pass
    append(run_dir, step(9, 0.0, loss=9.0))
    with followers(run_dir, TENSORBOARD):
        pass
    losses = scalars(run_dir)["step/loss"]
    assert [number for number, _ in losses] == list(range(1, 10))
    assert [value == 9.0 for _, value in losses] == [False] * 3 + [True] * 6
    assert len(list((run_dir / "tensorboard").iterdir())) == 3


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The tracker's package is one of ours, its server is here."""
    path = [str(write_package(tmp_path / "packages")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    with serving() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


@pytest.mark.parametrize("mode", ["hangs", "dies", "refuses"])
def test_a_tracker_that_fails_costs_the_run_its_wait_and_the_next_start_sends_everything(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    run_dir = write_run(tmp_path / "run", events(4, is_complete=False))
    settings = ReportSection(html=False, trackers=("mlflow",), wait_seconds=1)
    server.mode = mode
    if mode == "refuses":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with followers(run_dir, settings):
        log = run_dir / "logs" / "tracker-mlflow.log"
        wait_for(
            lambda: server.num_requests > 0 if mode == "hangs" else log.exists() and "Traceback" in log.read_text()
        )
        left = time.monotonic()
    assert time.monotonic() - left < 20
    output = capfd.readouterr()
    assert "the rest is sent at the next start" in output.out and "--send mlflow" in output.out
    assert output.out.count("tried again") == (0 if mode == "hangs" else 1) and output.err == ""

    server.mode = "answers"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    append(run_dir, *events(6, 4))
    with followers(run_dir, ReportSection(html=False, trackers=("mlflow",))):
        pass
    assert [number for number, _ in server.points("step/loss")] == [1, 2, 3, 4, 5, 6]
    assert server.status == "FINISHED" and len(server.runs) == 1
    assert server.params["optimizer.lr_multipliers.v"] == "4.0"
    assert capfd.readouterr().out == ""


def test_a_run_is_sent_by_hand(tmp_path: Path, server: Server) -> None:
    run_dir = write_run(tmp_path / "run", events(4))

    def command(tracker: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "qvtune.report", str(run_dir), "--send", tracker]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)

    server.mode = "dies"
    failed = command("mlflow")
    assert failed.returncode == 2 and "mlflow has not taken everything" in failed.stderr
    server.mode = "answers"
    assert command("mlflow").returncode == 0 and len(server.points("step/loss")) == 4
    assert command("mlflow").returncode == 0 and len(server.points("step/loss")) == 4, "nothing is sent twice"
    (run_dir / METRICS).unlink()
    assert command("mlflow").returncode == 2
