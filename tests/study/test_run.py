"""Cells are shared out, workers that die are replaced, and a study goes on after any kill. Workers are fake ones."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qvtune.errors import UserError
from qvtune.study import processes
from qvtune.study.cell import Cell, read_cells
from qvtune.study.run import main, open_study, run_cells
from qvtune.submit.batch import has_finished
from tests.support.processes import REPOSITORY

FAKE = str(Path(__file__).with_name("fake_worker.py"))
# A process that runs the cells that it is given, as launch/study.py does.
SCRIPT = f"""
import sys
from pathlib import Path
from qvtune.distributed.command import run_alone
from qvtune.study import processes
from qvtune.study.cell import Cell
from qvtune.study.run import run_cells

processes.WORKER = ({FAKE!r},)
recipe, study, *names = sys.argv[1:]
cells = [Cell(name, (), {{}}) for name in names]
sys.exit(run_alone(lambda: run_cells(Path(recipe), cells, Path(study), workers=2)))
"""


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processes, "WORKER", (FAKE,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run_dir: runs/x\ntrain: {max_steps: 6}\ndata: {eval: demo}\n")
    return path


def cells(*names: str) -> list[Cell]:
    return [Cell(name, (), {}) for name in names]


def starts(study: Path, name: str) -> int:
    path = study / "cells" / name / "starts"
    return len(path.read_text().split()) if path.exists() else 0


def complete(study: Path) -> set[str]:
    return {cell.name for cell in read_cells(study) if has_finished(study / "cells" / cell.name)}


def reason(study: Path, name: str) -> str:
    return (study / "cells" / name / "failed.txt").read_text()


def test_cells_that_fail_are_named_with_their_reason_and_the_rest_is_complete(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, names = tmp_path / "study", ["a", "fails", "b", "breaks", "dies", "dies-once", "c"]
    assert run_cells(recipe, cells(*names), study, workers=2) == ["fails", "breaks", "dies"]
    assert complete(study) == {"a", "b", "c", "dies-once"}
    assert reason(study, "fails") == "data.train: no such file\n"
    assert "RuntimeError: step 3: the loss is nan" in reason(study, "breaks")
    assert reason(study, "dies").startswith("its process has ended 2 times, the last time with signal 9; its output:")
    found = {name: starts(study, name) for name in names}
    assert found.pop("dies") in (2, 3), "once more where one worker took it before the other one's death was noticed"
    assert found == {**dict.fromkeys(found, 1), "dies-once": 2}
    printed = capsys.readouterr().out
    assert "7 of 7 cells to train, 2 workers" in printed
    assert "4 of 7 cells, 3 failed | " in printed and "| c: loss 1.0000 (0 s)" in printed
    assert "| breaks: RuntimeError: step 3: the loss is nan" in printed
    assert "s left | " in printed

    assert run_cells(recipe, cells(*names), study, workers=2) == ["fails", "breaks", "dies"]
    tried = {"fails": 2, "breaks": 2, "dies-once": 2}
    assert {name: starts(study, name) for name in found} == {**dict.fromkeys(found, 1), **tried}
    assert starts(study, "dies") in (4, 5, 6)


def test_a_grid_that_grows_trains_what_is_new(recipe: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    for names in (["a", "b"], ["b", "c"], ["b", "c"]):
        assert run_cells(recipe, cells(*names), study, workers=1) == []
        assert [cell.name for cell in read_cells(study)] == names
    assert [starts(study, name) for name in "abc"] == [1, 1, 1]


def test_another_study_in_the_same_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    run_cells(recipe, cells("a"), study, workers=1)
    recipe.write_text("# a comment is no change\n" + recipe.read_text())
    run_cells(recipe, cells("a"), study, workers=1)
    recipe.write_text(recipe.read_text().replace("6", "7"))
    with pytest.raises(UserError) as caught:
        run_cells(recipe, [Cell("a", ("train.seed=1",), {})], study, workers=1)
    first, second, advice = caught.value.problems
    assert f"recipe.yaml is not {recipe}" in first and "1 cells there had other settings: a" in second
    assert "give another run_dir" in advice


def test_workers_that_do_not_start_end_the_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "WORKER", ("-c", "import sys; sys.exit('no torch here')"))
    with pytest.raises(UserError, match=r"workers do not start, the last one ended with exit code 1; see .*worker-"):
        run_cells(recipe, cells("a", "b"), tmp_path / "study", workers=2)
    assert "no torch here" in (tmp_path / "study" / "logs" / "worker-0.log").read_text()


def start(recipe: Path, study: Path, names: Sequence[str]) -> subprocess.Popen[Any]:
    output = (study.parent / "output.txt").open("ab")
    command = [sys.executable, "-c", SCRIPT, str(recipe), str(study), *names]
    with output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_to_stop_ends_all_workers(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    study = tmp_path / "study"
    process = start(recipe, study, ["slow-1", "slow-2", "c"])
    wait_for(lambda: starts(study, "slow-1") and starts(study, "slow-2"))
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert complete(study) == set() and not list((study / "locks").iterdir())
    assert f"stopped on request ({number.name}); the same command resumes" in (tmp_path / "output.txt").read_text()
    assert start(recipe, study, ["slow-1", "slow-2", "c"]).wait(timeout=60) == 0
    assert complete(study) == {"slow-1", "slow-2", "c"}


def test_two_commands_in_one_folder_share_the_cells(recipe: Path, tmp_path: Path) -> None:
    study, names = tmp_path / "study", [f"cell-{number}" for number in range(12)]
    both = [start(recipe, study, names) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert complete(study) == set(names) and {starts(study, name) for name in names} == {1}


def test_a_task_of_an_array_trains_what_is_left_and_does_not_wait(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Path] = []
    monkeypatch.setattr("qvtune.study.report.write_report", reported.append)
    study, names = tmp_path / "study", ["slowest-1", "slowest-2", "b", "fails"]
    other = start(recipe, study, names[:2])
    wait_for(lambda: starts(study, "slowest-1") and starts(study, "slowest-2"))
    open_study(recipe, cells(*names), study)
    assert main([str(study), "1", "1"]) == 1
    assert (
        complete(study) == {"b"}
        and "1 of 4 cells have failed (cells/NAME/failed.txt): fails" in capsys.readouterr().err
    )
    assert [starts(study, name) for name in names] == [1, 1, 1, 1] and reported == [study]
    other.terminate()
    assert other.wait(timeout=60) == 75


def test_kills_at_random_change_nothing_in_the_end(recipe: Path, tmp_path: Path) -> None:
    """The command and its workers, again and again; what a killed command leaves behind ends by itself."""
    study, names = tmp_path / "study", [f"cell-{number}" for number in range(30)] + ["fails"]
    chance, num_kills = random.Random(0), 0
    for _ in range(6):
        process = start(recipe, study, names)
        enough = sum(starts(study, name) for name in names) + chance.randint(1, 4)
        wait_for(lambda: sum(starts(study, name) for name in names) >= enough)  # noqa: B023 - called at once
        workers = _children(process.pid)
        for victim in chance.choice([[process.pid], workers, [process.pid, *workers], workers[:1]]):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                num_kills += 1
        process.terminate()
        process.wait(timeout=60)
    assert num_kills >= 6 and 0 < len(complete(study)) < len(names)
    assert start(recipe, study, names).wait(timeout=60) == 0
    assert complete(study) == set(names) - {"fails"}
    assert [name for name in names if (study / "cells" / name / "failed.txt").exists()] == ["fails"]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_shares_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert [(one.num_ranks, one.gpus, one.threads) for one in processes.shares(None, 1, 9)] == [(1, None, 1)] * 6
    assert [(one.num_ranks, one.threads) for one in processes.shares(None, 2, 2)] == [(2, 1)] * 2
    assert [one.threads for one in processes.shares(None, 1, 2)] == [3, 3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [one.gpus for one in processes.shares(None, 1, 9)] == ["4", "5", "6", "7"]
    assert [one.gpus for one in processes.shares(None, 2, 9)] == ["4,5", "6,7"]
    with pytest.raises(UserError, match="3 workers of 2 ranks need as many GPUs; this machine has 4"):
        processes.shares(3, 2, 9)
