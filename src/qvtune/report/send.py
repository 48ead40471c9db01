"""Sends what metrics.jsonl has to a tracker, each event once, however often that is interrupted."""

import errno
import fcntl
import json
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import IO

from qvtune.config.report import TrackerName
from qvtune.errors import UserError
from qvtune.report.history import METRICS
from qvtune.report.json_lines import Entry, JsonLinesReader
from qvtune.report.run_record import flattened, read_settings
from qvtune.report.trackers.tracker import SENT, Point, Tracked, Tracker, open_tracker, point_of
from qvtune.storage.atomic import atomic_file

FOLDER = "trackers"
_LOOK_SECONDS, _RETRY_SECONDS, _MAX_RETRY_SECONDS = 2.0, 10.0, 300.0


@dataclass
class Position:
    """How far a tracker is: ``offset`` bytes and ``lines`` of metrics.jsonl are confirmed.

    ``key``: the run's name at the tracker. ``steps``: event -> the last step that was sent.
    """

    key: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    offset: int = 0
    lines: int = 0
    steps: dict[str, int] = field(default_factory=dict)


class Sender:
    """One tracker of a run. What is confirmed is kept in ``run_dir/trackers/NAME.json``.

    There is one at a time, where the file system has locks: a second one waits, or raises UserError if not ``waits``.
    """

    def __init__(self, name: TrackerName, run_dir: Path, project: str, *, waits: bool = True) -> None:
        self._name, self._run_dir, self._project = name, run_dir, project
        self._path = run_dir / FOLDER / f"{name}.json"
        self._path.parent.mkdir(exist_ok=True)
        self._lock = _locked(self._path.with_suffix(".lock"), waits)
        self._reader = JsonLinesReader(run_dir / METRICS)
        self._tracker: Tracker | None = None
        self._position = Position()
        self._reason: str | None = None

    def is_current(self) -> bool:
        """Whether the run folder still belongs to the run that is sent."""
        return self._reader.is_current()

    def send(self, *, is_last: bool) -> None:
        """Send what is new; with ``is_last`` close the tracker, after which everything is stored.

        Raises what the tracker raises. The next call starts again behind what was confirmed.
        """
        try:
            tracker = self._tracker = self._tracker or self._open()
            for batch in self._reader.batches():
                self._send(batch, tracker)
                if tracker.confirms:
                    self._confirm()
            if is_last:
                tracker.close(self._reason)
                self._confirm()
        except BaseException:
            self._tracker = None
            raise

    def _open(self) -> Tracker:
        self._position = Position(**json.loads(self._path.read_text())) if self._path.exists() else Position()
        self._confirm()  # the key, before the tracker has a run of it
        self._reader.offset = self._position.offset
        last_step = max(self._position.steps.values(), default=-1)
        config = flattened(read_settings(self._run_dir))
        return open_tracker(self._name, Tracked(self._run_dir, self._project, self._position.key, last_step, config))

    def _send(self, batch: list[Entry], tracker: Tracker) -> None:
        position = self._position
        points: list[Point] = []
        for line, entry in enumerate(batch, position.lines):
            event = entry["event"]
            if event == "run_start":
                self._reason = None
                if tracker.forgets:
                    tracker.log(points)
                    points = []
                    tracker.forget_after(entry["step"])
                    position.steps = {name: min(step, entry["step"]) for name, step in position.steps.items()}
            elif event == "run_end":
                self._reason = entry["reason"]
            elif event in SENT and entry["step"] > position.steps.get(event, -1):
                points.append(point_of(entry, line))
                position.steps[event] = entry["step"]
        tracker.log(points)
        position.lines += len(batch)
        position.offset = self._reader.offset

    def _confirm(self) -> None:
        with atomic_file(self._path) as private:
            private.write_text(json.dumps(asdict(self._position)))


def _locked(path: Path, waits: bool) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise UserError(f"{path.parent.parent} is being sent to {path.stem} by its run; wait for its end") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
            raise
    return file


def keep_sending(sender: Sender, ended: Event, say: Callable[[str], None]) -> bool:
    """Send until ``ended``; whether everything has arrived then. What the tracker raises is said once, and tried again.

    The wait between two attempts grows, up to some minutes.
    """
    wait_seconds, is_told = _RETRY_SECONDS, False
    while True:
        is_over = ended.is_set()
        if not sender.is_current():  # another run has taken the folder
            return True
        try:
            sender.send(is_last=is_over)
        except Exception as error:  # noqa: BLE001  # of whatever kind: the tracker is no part of the run
            traceback.print_exc()
            if not is_told:
                first_line, *_ = str(error).strip().splitlines() or [""]
                say(f"{type(error).__name__}: {first_line}")
            is_told = True
            if is_over:
                return False
            ended.wait(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _MAX_RETRY_SECONDS)
        else:
            if is_over:
                return True
            wait_seconds, is_told = _RETRY_SECONDS, False
            ended.wait(_LOOK_SECONDS)
