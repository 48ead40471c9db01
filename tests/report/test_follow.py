"""The process that keeps report.html up to date while a run goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qvtune.config.report import ReportSection
from qvtune.report import followers as followers_module
from qvtune.report.followers import followers
from qvtune.report.history import METRICS
from qvtune.report.keep_page import PageKeeper, keep_page
from tests.report.runs import append, events, step, wait_for, write_run

REPORT = "report.html"
PAGE = ReportSection(trackers=())


def shows(run_dir: Path, text: str) -> bool:
    page = run_dir / REPORT
    return page.exists() and text in page.read_text(encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", events(10, is_complete=False))


def test_the_page_is_there_from_the_start_and_complete_at_the_end(run_dir: Path) -> None:
    with followers(run_dir, PAGE):
        wait_for(lambda: shows(run_dir, "running: step 10 of 10"))
        append(run_dir, {"event": "run_end", "time": time.time(), "step": 10, "reason": "stopped"})
    assert shows(run_dir, "stopped on request after a complete checkpoint")


def test_a_run_that_fails_has_a_page_that_says_so(run_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="the run's own"), followers(run_dir, PAGE):
        raise RuntimeError("the run's own")
    assert shows(run_dir, "ended before its end")


def test_a_run_that_is_killed_has_a_page_that_says_so(run_dir: Path) -> None:
    """SIGKILL of the process that has started the follower; SIGTERM and SIGINT of all of them do nothing to it."""
    code = f"""
import time
from pathlib import Path
from qvtune.config.report import ReportSection
from qvtune.report.followers import followers
with followers(Path({str(run_dir)!r}), ReportSection(trackers=())):
    time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_for(lambda: shows(run_dir, "running: step 10 of 10"))
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(int(children[0]), number)
        append(run_dir, step(11, time.time()))
    finally:
        run.kill()
        run.wait()
    wait_for(lambda: shows(run_dir, "ended before its end"))
    assert shows(run_dir, "step 11 of 10"), "what was written last is in it"
    wait_for(lambda: not Path(f"/proc/{children[0]}").exists())


def test_a_follower_that_hangs_ends_by_itself_and_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "logs").mkdir()
    os.mkfifo(run_dir / "logs" / "hang-1.json")  # reading it waits for a writer for ever
    monkeypatch.setattr("qvtune.report.followers._GRACE_SECONDS", 30.0)
    started = time.monotonic()
    with followers(run_dir, ReportSection(trackers=(), wait_seconds=1)):
        pass
    assert time.monotonic() - started < 20
    output = capfd.readouterr().out
    assert f"report.html: its process ended with code {-signal.SIGALRM}" in output and "qvtune.report" in output


def test_a_follower_that_cannot_be_started_is_said(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(followers_module.subprocess, "Popen", fails)
    with followers(run_dir, PAGE):
        pass
    assert "report.html: its process cannot be started (Cannot allocate memory)" in capfd.readouterr().out


def test_without_the_setting_nothing_is_started(run_dir: Path) -> None:
    with followers(run_dir, ReportSection(html=False, trackers=())):
        pass
    assert not (run_dir / REPORT).exists()


def test_what_the_disk_refuses_is_said_once_and_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended, is_full, looks = threading.Event(), [True], []

    def write(*args: object, **options: object) -> None:
        looks.append(options["is_alive"])
        if len(looks) == 3:
            is_full[0] = False
            ended.set()
        if is_full[0]:
            raise OSError("No space left on device")

    monkeypatch.setattr("qvtune.report.keep_page.write_report", write)
    monkeypatch.setattr("qvtune.report.keep_page._LOOK_SECONDS", 0.0)
    keep_page(run_dir, ended)
    assert looks == [True, True, True, False]
    assert capfd.readouterr().out.count("report.html: No space left on device") == 1


def test_pages_are_so_seldom_that_they_take_little_time(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 0.5 s here: the next one follows 50 s later."""
    clock, written = [0.0], []

    def write(*args: object, **options: object) -> None:
        written.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr("qvtune.report.keep_page.write_report", write)
    monkeypatch.setattr("qvtune.report.keep_page.time.monotonic", lambda: clock[0])
    follower = PageKeeper(run_dir)
    for second in range(120):
        clock[0] = max(clock[0], float(second))
        follower.receive([step(second + 1, 0.0)])
        follower.write(is_over=False)
    assert written == [0.0, 50.0, 100.0]
    follower.write(is_over=True)
    assert len(written) == 4


def test_a_page_without_news_is_not_written_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    monkeypatch.setattr("qvtune.report.keep_page.write_report", lambda *args, **options: written.append(options))
    monkeypatch.setattr("qvtune.report.keep_page._LEAST_SECONDS", 0.0)
    follower = PageKeeper(run_dir)
    for _ in range(5):
        follower.write(is_over=False)
    assert written == [{"is_alive": True}]


def test_a_follower_of_an_earlier_run_leaves_the_folder_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run takes the folder while this one reads."""

    def taken(keeper: PageKeeper, entries: object) -> None:
        (run_dir / "new").write_text("")
        (run_dir / "new").replace(run_dir / METRICS)

    monkeypatch.setattr(PageKeeper, "receive", taken)
    keep_page(run_dir, threading.Event())
    assert not (run_dir / REPORT).exists()
