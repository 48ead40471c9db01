"""TensorBoard: event files in ``run_dir/tensorboard``."""

import os
import socket
import time
from collections.abc import Sequence

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from qvtune.report.trackers.tracker import Point, Tracked

_VERSION = "brain.Event:2"  # of the format, in the first record of a file


class TensorBoard:
    """Appends to a file of its own, which TensorBoard reads after those of earlier starts.

    It writes without torch, and in the calling thread: a disk that is full is an OSError of ``log``.
    """

    confirms, forgets = True, True

    def __init__(self, run: Tracked) -> None:
        folder = run.run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(path.open("xb"))
        self._write(Event(wall_time=time.time(), file_version=_VERSION))
        self.forget_after(run.last_step)  # of what comes now a part may have been written before a crash

    def log(self, points: Sequence[Point]) -> None:
        """Write numbers and flush them."""
        for point in points:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.numbers.items()]
            self._write(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self._records.flush()

    def forget_after(self, step: int) -> None:
        """TensorBoard drops what earlier files have of later steps."""
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def close(self, reason: str | None) -> None:
        """Flush and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
