"""metrics.jsonl as it is written and read, also by a run that crashed and went on."""

import json
import math
import time
from pathlib import Path

import pytest

from qvtune.report.json_lines import read_json_lines
from qvtune.report.metrics import MetricsLog, read_metrics


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    before = time.time()
    log.write("run_start", step=0)
    for step in (1, 2):
        log.write("step", step=step, loss=1.0 / step, lr={"q": 0.1, "v": 0.4})
    log.write("eval", step=2, loss=0.5)
    log.close()
    steps = read_metrics(tmp_path, "step")
    assert [(entry["step"], entry["loss"], entry["lr"]["v"]) for entry in steps] == [(1, 1.0, 0.4), (2, 0.5, 0.4)]
    assert [entry["loss"] for entry in read_metrics(tmp_path, "eval")] == [0.5]
    assert read_metrics(tmp_path, "checkpoint") == []
    assert before <= steps[0]["time"] <= steps[1]["time"] <= time.time()


def test_a_line_is_there_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("step", step=1, loss=2.5)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 2.5
    log.close()


def test_numbers_come_back_in_every_bit_and_infinite_ones_too(tmp_path: Path) -> None:
    """NaN and infinity are no JSON, and stand in a batch with lines that are."""
    numbers = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1, math.inf, -math.inf, math.nan]
    for values in (numbers[:5], numbers):
        log = MetricsLog(tmp_path)
        for value in values:
            log.write("eval", step=0, loss=value)
        log.close()
        found = [entry["loss"] for entry in read_json_lines(tmp_path / "metrics.jsonl")]
        assert list(map(repr, found)) == list(map(repr, values))
        (tmp_path / "metrics.jsonl").unlink()


def test_of_a_step_that_was_run_twice_the_last_counts(tmp_path: Path) -> None:
    """A crash after step 4, a resume from the checkpoint of step 2."""
    for first_step, last_step in ((1, 4), (3, 5)):
        log = MetricsLog(tmp_path)
        log.write("run_start", step=first_step - 1)
        for step in range(first_step, last_step + 1):
            log.write("step", step=step, loss=10.0 * first_step + step)
            log.write("eval", step=step, loss=0.0)
        log.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path, "step")] == [
        (1, 11.0),
        (2, 12.0),
        (3, 33.0),
        (4, 34.0),
        (5, 35.0),
    ]
    assert [entry["step"] for entry in read_metrics(tmp_path, "eval")] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in read_metrics(tmp_path, "run_start")] == [0, 2], "starts are all kept"


def test_a_line_that_a_crash_cut_off_is_removed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("step", step=1, loss=2.5)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    log = MetricsLog(tmp_path)
    log.write("step", step=2, loss=1.5)
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path, "step")] == [1, 2]


def test_a_line_that_is_not_complete_yet_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "step", "st', encoding="utf-8")
    assert [one["step"] for one in read_metrics(tmp_path, "step")] == [1]


def test_without_a_file_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path, "step")
