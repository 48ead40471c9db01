"""What metrics.jsonl says, in a form that takes little memory however many steps a run has."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtune.report.json_lines import Entry, JsonLinesReader

Column = NDArray[np.float64]
METRICS = "metrics.jsonl"


@dataclass
class Start:
    """One start of a run: its event ``run_start``, its ``run_end`` if there is one, and what came in between.

    ``error``: of its event ``run_failed``, empty where there is none.
    ``seconds``: what its time was spent on: ``training``, ``evaluation``, ``generation``, ``checkpoints`` (the time in
    which training waited for them), and ``loading`` the base, which comes before ``run_start``.
    """

    begin: Entry
    last_time: float
    last_step: int
    end: Entry | None = None
    error: str = ""
    seconds: Counter[str] = field(default_factory=Counter)

    @property
    def total_seconds(self) -> float:
        """From ``run_start`` to the last event."""
        return self.last_time - float(self.begin["time"])


_SPENT = {  # event -> what its time is spent on, and the field that has it
    "base_loaded": ("loading", "seconds"),
    "eval": ("evaluation", "seconds"),
    "generation": ("generation", "seconds"),
    "checkpoint": ("checkpoints", "blocked_seconds"),
}


class History:
    """Numbers of steps as columns, all other events as they are; ``add`` takes the events in the order of the file.

    Of a step that was run twice (crash, resume) only the last event counts. Of generations only the first and the last
    keep their answers.
    """

    def __init__(self) -> None:
        self.events: list[Entry] = []
        self.starts: list[Start] = []
        self.num_repeated, self.repeated_seconds = 0, 0.0
        self._columns: dict[str, array[float]] = {"step": array("d")}
        self._generations: list[Entry] = []

    def add(self, entries: Iterable[Entry]) -> None:
        """Take further events."""
        steps: list[Entry] = []
        for entry in entries:
            if entry["event"] == "step":
                steps.append(entry)
                continue
            self._add_steps(steps)
            steps = []
            self._add_event(entry)
        self._add_steps(steps)

    def names(self) -> list[str]:
        """Of the columns; entries of a mapping by their path: ``lr/q``."""
        return list(self._columns)

    def column(self, name: str) -> Column:
        """One number for each step; NaN where a step does not have it."""
        return np.array(self._columns.get(name, [math.nan] * len(self._columns["step"])))

    def of(self, event: str) -> list[Entry]:
        """All events of one kind; of a step that was run twice the last one."""
        found: dict[Any, Entry] = {}
        for number, entry in enumerate(self.events):
            if entry["event"] == event:
                key = entry["step"] if event in ("eval", "generation", "checkpoint") else number
                found.pop(key, None)
                found[key] = entry
        return list(found.values())

    def _add_event(self, entry: Entry) -> None:
        event = entry["event"]
        if event == "run_start":
            self._forget_steps_after(entry["step"])
            self.starts.append(Start(entry, entry["time"], entry["step"]))
        if event == "generation":
            if len(self._generations) > 1:
                self._generations[-1].pop("answers", None)
            self._generations.append(entry)
        self.events.append(entry)
        if self.starts:
            start = self.starts[-1]
            start.last_time = entry["time"]
            start.end = entry if event == "run_end" else start.end
            start.error = entry["error"] if event == "run_failed" else start.error
            kind, seconds = _SPENT.get(event, ("", ""))
            start.seconds[kind] += entry.get(seconds, 0.0)

    def _add_steps(self, steps: Sequence[Entry]) -> None:
        if not steps:
            return
        rates = [step.get("lr", {}) for step in steps]
        columns = {name: _column(steps, name) for name in sorted(set().union(*steps) - {"event", "lr"})}
        columns |= {f"lr/{group}": _column(rates, group) for group in sorted(set().union(*rates))}
        num_before = len(self._columns["step"])
        for name, values in columns.items():
            self._columns.setdefault(name, array("d", [math.nan]) * num_before).extend(values)
        for column in self._columns.values():
            column.extend([math.nan] * (num_before + len(steps) - len(column)))
        if self.starts:
            start = self.starts[-1]
            start.last_time, start.last_step = steps[-1]["time"], steps[-1]["step"]
            start.seconds["training"] += sum(step["seconds"] for step in steps)

    def _forget_steps_after(self, step: int) -> None:
        kept = int(np.searchsorted(self.column("step"), step, side="right"))
        self.num_repeated += len(self._columns["step"]) - kept
        self.repeated_seconds += float(np.nansum(self.column("seconds")[kept:]))
        for column in self._columns.values():
            del column[kept:]


def _column(entries: Sequence[Entry], name: str) -> "array[float]":
    try:
        return array("d", map(itemgetter(name), entries))
    except (KeyError, TypeError):  # not all of them have it, as a number
        values = (entry.get(name) for entry in entries)
        return array("d", [value if isinstance(value, int | float) else math.nan for value in values])


def read_history(run_dir: Path) -> History:
    """The whole of ``run_dir/metrics.jsonl``; a line that is not complete is left out."""
    history, reader = History(), JsonLinesReader(run_dir / METRICS)
    try:
        for batch in reader.batches():
            history.add(batch)
    finally:
        reader.close()
    return history
