"""Keeps report.html up to date while a run writes metrics.jsonl."""

import threading
import time
from pathlib import Path

from qvtune.console import console
from qvtune.errors import UserError
from qvtune.report.history import METRICS, History
from qvtune.report.json_lines import Entry, JsonLinesReader
from qvtune.report.run_page import REPORT, write_report

_LOOK_SECONDS = 2.0
_LEAST_SECONDS, _BUILDS_APART = 10.0, 100  # between two pages: so many seconds, and times the time that one takes


class PageKeeper:
    """Writes report.html at most once in ``_LEAST_SECONDS``, and so seldom that it takes a hundredth of a core."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._history = run_dir, History()
        self._is_new, self._due = True, 0.0

    def receive(self, entries: list[Entry]) -> None:
        """Take further events."""
        self._history.add(entries)
        self._is_new = True

    def write(self, *, is_over: bool) -> None:
        """Write the page if it is time and there is something new; in any case when the run ``is_over``."""
        started = time.monotonic()
        if is_over or (self._is_new and started >= self._due):
            write_report(self._run_dir, self._history, is_alive=not is_over)
            took = time.monotonic() - started
            self._is_new, self._due = False, started + max(_LEAST_SECONDS, _BUILDS_APART * took)


def keep_page(run_dir: Path, ended: threading.Event) -> None:
    """Write the page again and again until ``ended``, or until another run has taken the run folder.

    What the file system refuses is said once and tried again.
    """
    reader, keeper, is_told = JsonLinesReader(run_dir / METRICS), PageKeeper(run_dir), False
    while True:
        is_over = ended.is_set()
        try:
            for batch in reader.batches():
                keeper.receive(batch)
            if not reader.is_current():
                return
            keeper.write(is_over=is_over)
            is_told = False
        except (OSError, UserError) as error:
            if not is_told:
                console().print(f"{REPORT}: {error}", markup=False)
            is_told = True
        if is_over:
            return
        ended.wait(_LOOK_SECONDS)
