"""What a tracker is, and which ones there are."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qvtune.config.report import ReportSection, TrackerName
from qvtune.errors import UserError
from qvtune.report.json_lines import Entry

SENT = ("step", "eval", "generation")  # events whose numbers trackers get


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker is told of it. ``key`` names it there, and stays the same when it is resumed.

    ``last_step``: the last step of which the tracker has confirmed something; -1: none. ``config``: all settings.
    """

    run_dir: Path
    project: str
    key: str
    last_step: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The numbers of an event by their path, as ``eval/sets/NAME/loss``. ``line``: that of metrics.jsonl, from 0."""

    line: int
    time: float
    step: int
    numbers: Mapping[str, float]


class Tracker(Protocol):
    """Takes the numbers of a run. All methods may wait, or raise any exception: the run does not notice.

    ``confirms``: what ``log`` has taken is stored when it returns; else it is when ``close`` returns. ``forgets``:
    whether numbers can be taken back.
    """

    confirms: bool
    forgets: bool

    def log(self, points: Sequence[Point]) -> None:
        """Store numbers."""

    def forget_after(self, step: int) -> None:
        """Where it ``forgets``: numbers of later steps do not count, as these are run again."""

    def close(self, reason: str | None) -> None:
        """The end: ``completed``, ``stopped``, or None where the run has failed or was killed."""


def require_trackers(settings: ReportSection) -> None:
    """Raises UserError naming each tracker whose package is not installed."""
    if missing := [name for name in settings.trackers if importlib.util.find_spec(name) is None]:
        advice = "install it ({}) in the environment of the run, or leave it out"
        raise UserError(
            [
                f"report.trackers: {name}, but its package is not installed; {advice.format(f'pip install {name}')}"
                for name in missing
            ]
        )


def open_tracker(name: TrackerName, run: Tracked) -> Tracker:
    """Import the tracker's package and connect to where it stores."""
    if name == "tensorboard":
        from qvtune.report.trackers.tensorboard import TensorBoard

        return TensorBoard(run)
    if name == "wandb":
        from qvtune.report.trackers.wandb import Wandb

        return Wandb(run)
    from qvtune.report.trackers.mlflow import Mlflow

    return Mlflow(run)


def point_of(entry: Entry, line: int) -> Point:
    """The point of an event of ``SENT``."""
    fields = {key: value for key, value in entry.items() if key not in ("event", "time", "step")}
    return Point(line, entry["time"], entry["step"], dict(_numbers(fields, entry["event"])))


def _numbers(fields: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}/{key}")
        elif isinstance(value, int | float):
            yield f"{path}/{key}", value
