"""A process that reads metrics.jsonl while a run writes it: ``qvtune.report.followers`` starts it.

It ends a while after the run, whether that tells it so or dies, and reads what has been written until then.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from qvtune.console import console
from qvtune.distributed.stop_signals import IGNORED_BY_CHILDREN
from qvtune.errors import UserError
from qvtune.report.history import METRICS, History
from qvtune.report.json_lines import Entry, JsonLinesReader
from qvtune.report.run_page import REPORT, write_report

_LOOK_SECONDS = 2.0
_LEAST_SECONDS, _BUILDS_APART = 10.0, 100  # between two pages: so many seconds, and times the time that one takes
_LOWEST_PRIORITY = 19


class Follower(Protocol):
    """What is done with the events of a run."""

    def receive(self, entries: list[Entry]) -> None:
        """Take further events."""

    def rest(self, *, is_over: bool) -> None:
        """Called after each look into the file; ``is_over``: for the last time, as the run has ended."""


class ReportFollower:
    """Writes report.html at most once in ``_LEAST_SECONDS``, and so seldom that it takes a hundredth of a core."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._history = run_dir, History()
        self._is_new, self._due = True, 0.0

    def receive(self, entries: list[Entry]) -> None:
        """Take further events."""
        self._history.add(entries)
        self._is_new = True

    def rest(self, *, is_over: bool) -> None:
        """Write the page if there is something new."""
        started = time.monotonic()
        if is_over or (self._is_new and started >= self._due):
            write_report(self._run_dir, self._history, is_alive=not is_over)
            took = time.monotonic() - started
            self._is_new, self._due = False, started + max(_LEAST_SECONDS, _BUILDS_APART * took)


def follow(reader: JsonLinesReader, follower: Follower, ended: threading.Event, name: str) -> None:
    """Pass on what is written until ``ended``, or until another run has taken the run folder.

    What the file system refuses is said once and tried again.
    """
    is_told = False
    while True:
        is_over = ended.is_set()
        try:
            for batch in reader.batches():
                follower.receive(batch)
            if not reader.is_current():
                return
            follower.rest(is_over=is_over)
            is_told = False
        except (OSError, UserError) as error:
            if not is_told:
                console().print(f"{name}: {error}", markup=False)
            is_told = True
        if is_over:
            return
        ended.wait(_LOOK_SECONDS)


def _await_end(parent: int, wait_seconds: float, ended: threading.Event) -> None:
    """Wait until the parent writes to standard input, or is gone; after ``wait_seconds`` more SIGALRM ends the process.

    A file that is closed would say nothing: processes that the parent has forked have it open, too.
    """
    while os.getppid() == parent and not select.select([sys.stdin], [], [], _LOOK_SECONDS / 4)[0]:
        pass
    signal.alarm(math.ceil(wait_seconds))
    ended.set()


def main(name: str, run_dir: Path, parent: int, wait_seconds: float) -> None:
    """Follow the run of the process ``parent``, which has started this one."""
    for number in IGNORED_BY_CHILDREN:  # blocked so far
        signal.signal(number, signal.SIG_IGN)
    os.nice(_LOWEST_PRIORITY)
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(parent, wait_seconds, ended), daemon=True).start()
    assert name == REPORT
    follow(JsonLinesReader(run_dir / METRICS), ReportFollower(run_dir), ended, name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
