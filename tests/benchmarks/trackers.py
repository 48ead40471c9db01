"""Whether a tracker whose server hangs changes the time of a step: python -m tests.benchmarks.trackers

One run of a tiny model on one rank, with the report and a stand-in for MLflow (tests/report/stand_in.py) whose server
never answers. The processes that follow the run are stopped (SIGSTOP) and continued in turns of 20 steps, so that the
steps with and without them are those of one run; the order within a pair of turns alternates.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from qvtune.console import console
from tests.report.stand_in import serving, write_package
from tests.support.lab import make_lab
from tests.support.processes import REPOSITORY

_STEPS, _TURN, _WARM = 400, 20, 40


def main() -> None:
    """Run it, and print the median time of a step with and without followers."""
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        server.mode = "hangs"
        seconds = _run(Path(folder), server.uri)
        assert server.num_requests > 0, "the tracker has asked its server"
    table = Table("", "steps", "median, ms", "mean, ms")
    for name, found in seconds.items():
        values = [f"{function(found) * 1000:.3f}" for function in (statistics.median, statistics.fmean)]
        table.add_row(name, str(len(found)), *values)
    console().print(table)
    ratio = statistics.median(seconds["followed"]) / statistics.median(seconds["stopped"])
    console().print(f"ratio of the medians: {ratio:.4f}")


def _run(folder: Path, uri: str) -> dict[str, list[float]]:
    lab = make_lab(folder / "lab")
    config = lab.config("run", train__max_steps=_STEPS, report={"trackers": ["mlflow"], "wait_seconds": 1.0})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    environment = dict(os.environ) | lab.environment | {"MLFLOW_TRACKING_URI": uri, "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(write_package(folder / "packages")), str(REPOSITORY / "src")])
    words = [sys.executable, str(REPOSITORY / "launch/train.py"), "--config", str(folder / "run.yaml")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as run:
        is_stopped_at = _take_turns(run, lab.run_dir("run") / "metrics.jsonl")
        assert run.wait() == 0, "a tracker that hangs does not change the exit code"
    found: dict[str, list[float]] = {"followed": [], "stopped": []}
    for entry in lab.events("run", "step"):
        number = entry["step"] - 1
        if number >= _WARM and number % _TURN >= 2:  # the turn may begin a step late
            found["stopped" if is_stopped_at[number // _TURN] else "followed"].append(entry["seconds"])
    return found


def _take_turns(run: "subprocess.Popen[bytes]", metrics: Path) -> list[bool]:
    """Stop and continue the followers; returns for each turn whether they were stopped."""
    turns = [(turn % 2 == 1) ^ (turn // 2 % 2 == 1) for turn in range(_STEPS // _TURN + 1)]
    now = False
    while run.poll() is None:
        number = metrics.read_bytes().count(b'"event": "step"') if metrics.exists() else 0
        wanted = turns[number // _TURN] and number < _STEPS
        if wanted != now:
            for process in _followers(run.pid):
                os.kill(process, signal.SIGSTOP if wanted else signal.SIGCONT)
            now = wanted
        if number >= _STEPS:
            break
        time.sleep(0.02)
    return turns


def _followers(parent: int) -> Sequence[int]:
    children = [int(one) for one in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [one for one in children if b"qvtune.report.follow" in Path(f"/proc/{one}/cmdline").read_bytes()]


if __name__ == "__main__":
    main()
