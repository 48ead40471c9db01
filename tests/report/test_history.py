"""What metrics.jsonl says, read in batches."""

import json
from pathlib import Path

import numpy as np
import pytest

from qvtune.report.history import History, read_history
from qvtune.report.json_lines import JsonLinesReader
from qvtune.report.metrics import read_metrics
from tests.report.runs import answers, events, step, write_run


def test_columns_are_those_of_the_file(tmp_path: Path) -> None:
    """Also of a file that is read in several batches; the reference is a reader of whole files."""
    run_dir = write_run(tmp_path / "run", events(5000, every=500))
    history = read_history(run_dir)
    expected = read_metrics(run_dir, "step")
    assert len(expected) == 5000 and (run_dir / "metrics.jsonl").stat().st_size > 2 * 2**19
    for name in ("step", "loss", "seconds", "peak_rss_bytes"):
        assert history.column(name).tolist() == [entry[name] for entry in expected]
    assert history.column("lr/v").tolist() == [entry["lr"]["v"] for entry in expected]
    for event in ("eval", "checkpoint", "run_start", "run_end"):
        assert history.of(event) == read_metrics(run_dir, event)


def test_of_a_step_that_was_run_twice_the_last_counts(tmp_path: Path) -> None:
    """A kill after step 7, a resume from the checkpoint of step 4."""
    run_dir = write_run(tmp_path / "run", events(7, every=2, is_complete=False), events(10, 4, every=2))
    history = read_history(run_dir)
    assert history.column("step").tolist() == list(range(1, 11))
    assert history.column("time").tolist() == [entry["time"] for entry in read_metrics(run_dir, "step")]
    assert history.num_repeated == 3 and history.repeated_seconds == 1.5
    assert [entry["step"] for entry in history.of("eval")] == [0, 2, 4, 6, 8, 10]
    first, second = history.starts
    assert (first.begin["step"], first.last_step, first.end) == (0, 7, None)
    assert (second.begin["step"], second.last_step) == (4, 10) and second.end is not None
    assert first.seconds["training"] == 3.5 and second.seconds["loading"] == 2.5


def test_what_a_step_does_not_have_is_not_a_number() -> None:
    history = History()
    history.add([step(1, 0.0), {"event": "run_start", "time": 0.5, "step": 1}])
    history.add([step(2, 1.0, new=7.0, lr={"q": 0.25}), step(3, 2.0, loss=float("nan"))])
    assert np.isnan(history.column("new")).tolist() == [True, False, True]
    assert np.isnan(history.column("lr/v")).tolist() == [False, True, False]
    assert np.isnan(history.column("loss")).tolist() == [False, False, True]
    assert np.isnan(history.column("none of them")).all()


def test_answers_are_kept_of_the_first_and_the_last_generation() -> None:
    history = History()
    history.add([answers(number, f"answer {number}") for number in range(5)])
    assert ["answers" in entry for entry in history.of("generation")] == [True, False, False, False, True]


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    reader = JsonLinesReader(path)
    assert [one["a"] for batch in reader.batches() for one in batch] == [1, 2]
    assert list(reader.batches()) == []
    with path.open("a") as file:
        file.write(": 3}\n")
    assert list(reader.batches()) == [[{"a": 3}]]
    assert reader.offset == path.stat().st_size
    again = JsonLinesReader(path, offset=len('{"a": 1}\n'))
    assert list(again.batches()) == [[{"a": 2}, {"a": 3}]]
    assert reader.is_current()
    path.with_name("new").write_text(json.dumps({"a": 4}))
    path.with_name("new").replace(path)
    assert not reader.is_current()
    path.unlink()
    assert not again.is_current()


def test_a_line_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="Expecting value"):
        read_history(tmp_path)
