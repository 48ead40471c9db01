"""The helper of the batch scripts."""

import socket
import sys
from pathlib import Path

import pytest

from qvtune.distributed.hang_reports import HangFiles, Report
from qvtune.errors import UserError
from qvtune.submit import batch
from tests.support.processes import run_command

RECIPE = "run_dir: runs/a b\ntrain: {max_steps: 1}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_prepare_prints_a_port_and_the_run_folder(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvtune.submit.batch", "prepare", recipe, f"run_dir={tmp_path}/$(x) 'y'"]
    finished = run_command(command, tmp_path, timeout=60, SLURM_JOB_ID="123456")
    assert finished.code == 0, finished.output
    port, run_dir = finished.stdout.splitlines()
    assert 20_000 <= int(port) < 32_000
    assert run_dir == f"{tmp_path}/$(x) 'y'"


def test_prepare_says_all_that_is_wrong(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvtune.submit.batch", "prepare", recipe, "train.seeed=1", "adapter.rank=0"]
    finished = run_command(command, tmp_path, timeout=60, SLURM_JOB_ID="1")
    assert finished.code == 2, finished.output
    assert [line.split(":")[0] for line in finished.stderr.splitlines()] == ["error"] * 2
    assert "Traceback" not in finished.stderr and finished.stdout == ""


def test_a_relative_run_folder_is_that_of_the_working_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    assert batch.run_dir_of_job(recipe, []) == recipe.parent / "runs" / "a b"


def test_a_run_that_would_never_be_done_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        batch.run_dir_of_job(recipe, ["checkpoint.resume=never", "train.stop_after_step=1"])
    resume, stop = caught.value.problems
    assert "start from scratch each time" in resume and "stop there each time" in stop


def test_an_open_and_a_closed_port_are_answers_and_a_name_that_nobody_has_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert batch.lost_hosts(["localhost", "no-such-host.invalid"], port) == ["no-such-host.invalid"]
    assert batch.lost_hosts(["localhost"], port) == []


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ('{"event": "run_end", "reason": "completed"}\n', 0),
        ('{"event": "run_end", "reason": "stopped"}\n', 1),
        ('{"event": "step", "step": 3}\n', 1),
        ("", 1),
    ],
)
def test_a_run_has_finished_when_its_record_says_so(tmp_path: Path, last: str, code: int) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "run_end", "reason": "completed"}\n' * bool(last) + last)
    assert batch.main(["finished", str(tmp_path)]) == code
    assert batch.main(["finished", str(tmp_path / "nowhere")]) == 1


def test_a_hang_of_this_start_is_told_with_the_hosts_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for restart, rank in enumerate((1, 0, 1)):
        files = HangFiles(tmp_path / "logs", f"{restart}", ("n1", "n2"))
        files.report(Report(rank, files.hosts[rank], "step 7", 15.0, "it is in x.py", is_waiting=False))
        files.write_verdict(files.reports(), "12", restart)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert batch.main(["hung", str(tmp_path)]) == 0
    excluded, message = capsys.readouterr().out.split("\n", 1)
    assert excluded == "n2" and "rank 0 on n1: last seen at step 7" in message
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert batch.main(["hung", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_jobs_that_start_together_look_for_ports_far_apart(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between looking and listening pass seconds, in which the next task of an array must not find the same."""
    ports = []
    for job in ("14", "15"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert batch.main(["prepare", str(recipe)]) == 0
        ports.append(int(capsys.readouterr().out.splitlines()[0]))
    assert abs(ports[1] - ports[0]) > 50
