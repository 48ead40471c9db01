"""report.html of a run, and of several: what is in them, from folders that training could have left."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from qvtune.errors import UserError
from qvtune.report.compare_page import compare_page
from qvtune.report.page import Figure, Page, Table, Text, Value, as_html
from qvtune.report.run_page import run_page, write_report
from qvtune.report.run_record import duration, read_run, read_runs
from tests.report.runs import HOSTILE, START, answers, events, merge_report, write_json, write_run
from tests.report.test_page import Tags


def section(page: Page, title: str) -> list[Any]:
    (found,) = [one for one in page.sections if one.title == title]
    return list(found.parts)


def table(parts: list[Any], title: str) -> list[list[str]]:
    """The rows of the table whose title begins so, as text."""
    (found,) = [part for part in parts if isinstance(part, Table) and part.title.startswith(title)]
    return [[cell.text if isinstance(cell, Value) else cell for cell in row] for row in found.rows]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 100 steps that was killed after 57, and has answers, a merged model, a failed save and a hang."""
    failed = {"event": "save_failed", "time": START + 34.3, "step": 30, "problem": "No space left on device"}
    run_dir = write_run(
        tmp_path / "run",
        events(57, every=10, is_complete=False),
        iter([failed, answers(0, "5", "<b>", seconds=34.4)]),
        events(100, 50, every=10),
        iter([answers(100, "4", "</table>", seconds=1060.1)]),
    )
    merge_report(run_dir)
    write_json(run_dir / "logs" / "hang-1.json", {"message": "rank 1 on host b hangs", "hung": []})
    os.utime(run_dir / "logs" / "hang-1.json", (START + 500, START + 500))
    write_json(run_dir / "logs" / "hang-0.json", {"message": "of an earlier run", "hung": []})
    os.utime(run_dir / "logs" / "hang-0.json", (START - 500, START - 500))
    return run_dir


def test_every_section_is_there(run_dir: Path) -> None:
    page = run_page(read_run(run_dir))
    assert [one.title for one in page.sections] == [
        "Loss",
        "Learning rates and norms",
        "Speed and memory",
        "Starts and faults",
        "Answers",
        "Merged model",
        "Data",
        "Configuration and versions",
    ]
    assert {figure.name for figure in page.figures()} == {
        *("loss", "metrics", "rates", "gradient", "updates-layers", "updates-steps", "speed", "memory", "time"),
        *("starts", "ratios-merged", "lengths-data.train"),
    }
    facts = dict(page.facts)
    assert facts["state"] == "completed: step 100 of 100"
    assert facts["loss"].startswith("2.7000 -> 2.2000 nats per label token") and "(-18.5%)" in facts["loss"]
    assert facts["trained"] == "lora of q, v; parameters: q 552,960, v 368,640"
    assert facts["learning rate"] == "0.001, v * 4" and facts["speed"] == "2,800 tokens/s over 100 steps"


def test_starts_and_faults_are_listed(run_dir: Path) -> None:
    parts = section(run_page(read_run(run_dir)), "Starts and faults")
    assert "7 steps were run again after a resume (3.5 s)." in parts
    assert [row[3:] for row in table(parts, "Starts")] == [
        ["0 to 57", "34 s", "without run_end"],
        ["50 to 100", "30 s", "completed"],
    ]
    assert [row[1] for row in table(parts, "Faults")] == [
        "step 30 was not saved: No space left on device",
        "start 1, after step 57: ended without run_end",
        "rank 1 on host b hangs",
    ]


def test_answers_before_and_after_are_beside_each_other(run_dir: Path) -> None:
    (found,) = section(run_page(read_run(run_dir)), "Answers")
    assert list(found.columns) == ["prompt", "answer after step 0", "answer after step 100", "expected"]
    assert [list(row) for row in found.rows] == [["2 + 2?", "5", "4", "4"], ["2 + 2?", "<b>", "</table>", "4"]]


def test_the_proof_of_a_merged_model_is_shown(run_dir: Path) -> None:
    rows = table(section(run_page(read_run(run_dir)), "Merged model"), "merged/ (format merged, step 20)")
    assert ["same most likely token", "100.00%", "at least 100%"] in rows
    assert ["largest difference of logits", "8.20e-05", "at most 0.001"] in rows


def test_sample_rows_mark_the_text_of_the_loss(run_dir: Path) -> None:
    parts = section(run_page(read_run(run_dir)), "Data")
    (sample,) = [part for part in parts if isinstance(part, Text)]
    assert list(sample.pieces) == [(f"user: {HOSTILE}", False), ("the answer", True)]
    assert "<mark>the answer</mark>" in as_html(run_page(read_run(run_dir)))


def test_the_page_needs_nothing_else_and_escapes_every_text(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    tags = Tags(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert "http" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http://192.0.2.1/x.png", "")
    assert HOSTILE in tags.text and "</table>" in tags.text
    assert tags.seen.count("svg") == 12
    assert sorted(path.name for path in run_dir.glob("*report*")) == ["report.html"], "nothing unfinished is left"


@pytest.mark.parametrize(
    ("is_alive", "state", "how"),
    [
        (True, "running: step 57", "running"),
        (False, "ended before its end", "without run_end"),
        (None, "running, or", "running?"),
    ],
)
def test_a_run_that_has_no_end_says_what_is_known(tmp_path: Path, is_alive: bool | None, state: str, how: str) -> None:
    run_dir = write_run(tmp_path / "run", events(57, every=10, is_complete=False))
    page = run_page(read_run(run_dir, is_alive=is_alive))
    assert dict(page.facts)["state"].startswith(state)
    parts = section(page, "Starts and faults")
    assert table(parts, "Starts")[0][-1] == how
    assert any(isinstance(part, Table) and part.title == "Faults" for part in parts) is (is_alive is False)


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    failed = {"event": "run_failed", "time": START + 60.0, "step": 57, "error": f"RuntimeError: {HOSTILE}"}
    run_dir = write_run(tmp_path / "run", chain(events(57, is_complete=False), [failed]))
    for is_alive in (True, False, None):  # the process that writes the page may see the event before the rank has ended
        run = read_run(run_dir, is_alive=is_alive)
        parts = section(run_page(run), "Starts and faults")
        assert run.state == f"failed: step 57 of 57: RuntimeError: {HOSTILE}"
        assert table(parts, "Starts")[0][-1] == "failed"
        assert table(parts, "Faults")[0][1] == f"start 1, after step 57: failed: RuntimeError: {HOSTILE}"


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    page = run_page(read_run(tmp_path))
    assert dict(page.facts)["state"] == "no event is recorded yet" and page.sections == []
    run_dir = write_run(tmp_path / "run", events(0, is_complete=False))
    assert "Configuration and versions" in [one.title for one in run_page(read_run(run_dir)).sections]


def test_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", events(40, every=10))
    second = write_run(tmp_path / "second", events(20, every=10))
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("v: 4.0", "v: 8.0"))
    page = compare_page(read_runs([first, second]))
    results = table(section(page, "Results"), "Loss in nats")
    assert [row[:2] for row in results] == [["first", "40 of 40"], ["second", "20 of 20"]]
    assert table(section(page, "Settings that differ"), "") == [["optimizer.lr_multipliers.v", "4.0", "8.0"]]
    for figure in page.figures():
        assert isinstance(figure, Figure) and ">first</text>" in figure.svg and ">second</text>" in figure.svg
    assert {figure.name for figure in page.figures()} == {"evaluation", "training", "minutes", "gradient", "speed"}
    same = compare_page(read_runs([first, first]))
    assert section(same, "Settings that differ") == ["None: the runs have the same settings and the same commit."]


def test_all_folders_that_are_no_runs_are_named_at_once(tmp_path: Path) -> None:
    good = write_run(tmp_path / "run", events(3))
    damaged = write_run(tmp_path / "damaged", events(3))
    (damaged / "data.json").write_text("{")
    with pytest.raises(UserError) as raised:
        read_runs([tmp_path / "none", good, damaged])
    first, second = raised.value.problems
    assert "none is no run folder: it has no metrics.jsonl" in first and "damaged: a file of the run" in second


def command(*arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "qvtune.report", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_writes_the_page_of_one_run_or_of_several(tmp_path: Path) -> None:
    write_run(tmp_path / "a", events(3))
    write_run(tmp_path / "b", events(4))
    assert command("a", cwd=tmp_path).stdout == "a/report.html\n"
    assert "<title>Run a</title>" in (tmp_path / "a/report.html").read_text()
    assert command("a", "b", cwd=tmp_path).returncode == 0
    assert "<title>2 runs</title>" in (tmp_path / "comparison.html").read_text()
    assert command("a", "b", "--output", "x.html", cwd=tmp_path).stdout == "x.html\n"
    refused = command("a", "c", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1 and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.512, "0.51 s"), (42.4, "42 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
