"""Stop requests: a signal to any rank becomes one exception, raised on all ranks at the same place.

SIGTERM, SIGINT and SIGUSR1 request a stop. One request often arrives as several signals: Ctrl-C sends SIGINT to the
launcher and to the ranks, and the launcher then sends SIGTERM to its ranks; Slurm signals the launcher and the ranks,
and the launcher forwards it. A second request ends the process at once: it is a signal of the same kind as an earlier
one, ``REPEAT_SECONDS`` or more after the first of that kind.
"""

import itertools
import math
import os
import signal
import threading
import time
from pathlib import Path

from qvtune.distributed import heartbeat, process_group
from qvtune.distributed.stop_signals import end_at_second_request, listen, take_recorded
from qvtune.errors import StopRequested

AGREE_SECONDS = 1.0  # between meetings of the ranks in ``poll_in_time``
_POLL_SECONDS = 0.5  # between reads of what other ranks have announced, each of which is a request to rank 0's store
_numbers = itertools.count()


class StopRequest:
    """Handles stop signals from its construction to the end of the process. Create one per run, on all ranks.

    Signals that ``record_stop_signals`` has recorded before count as well. ``max_hours`` from now on it requests a stop
    itself, and when the process ``parent``, which has started this one, is gone.
    """

    def __init__(self, max_hours: float | None = None, parent: int | None = None) -> None:
        self._parent = parent
        self._max_hours = max_hours
        self._deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.signal: signal.Signals | None = None
        self._first_seconds: dict[signal.Signals, float] = {}
        self._announcement = f"qvtune/stop-{next(_numbers)}"
        self._next_poll = 0.0
        self._met_at, self._calls, self._calls_between_meetings = time.monotonic(), 0, 1
        self._launcher = _deepspeed_launcher()
        listen(self._received)
        for recorded, seconds in take_recorded().items():
            self._received(recorded, seconds)

    def _received(self, received: signal.Signals, seconds: float) -> None:
        end_at_second_request(self._first_seconds, received, seconds)
        if self.signal is None:
            self.signal = received
            # In another thread: it waits for rank 0, which may hang, and this one must receive a second request.
            threading.Thread(
                target=process_group.announce, args=(self._announcement, received.name), daemon=True
            ).start()

    def poll(self) -> None:
        """Raise StopRequested on all ranks if one of them has a stop request; collective, over host memory."""
        heartbeat.beat()
        seconds = (time.monotonic() - self._met_at) / max(1, self._calls)
        requested, slowest = process_group.max_over_hosts(self._requested(), seconds)
        # All ranks compute the same number. It at most doubles: the first pieces of a kind may be exceptionally short.
        in_time = max(1, int(AGREE_SECONDS / max(slowest, 1e-6)))
        self._calls_between_meetings = min(2 * self._calls_between_meetings, in_time)
        self._met_at, self._calls = time.monotonic(), 0
        if requested:
            raise StopRequested(self._reason())

    def poll_in_time(self) -> None:
        """As ``poll``, for many short pieces of work: call it before each of them, equally often on all ranks.

        The ranks meet only once in so many calls as the slowest of them makes in ``AGREE_SECONDS``, hence at every call
        where a piece takes longer. A request is noticed within 20 seconds even if all pieces suddenly take 20 times as
        long as before.
        """
        heartbeat.beat()
        self._calls += 1
        if self._calls >= self._calls_between_meetings:
            self.poll()

    def poll_alone(self) -> None:
        """The same for work of one rank inside ``process_group.raise_on_all_ranks``; cheap, so call it often."""
        heartbeat.beat()
        now = time.monotonic()
        if self.signal is None and now < self._next_poll:
            return
        self._next_poll = now + _POLL_SECONDS
        if self._requested() or process_group.announced(self._announcement):
            raise StopRequested(self._reason())

    def _requested(self) -> bool:
        is_orphan = self._parent is not None and os.getppid() != self._parent
        return self.signal is not None or self._is_late() or is_orphan or self._launcher != _deepspeed_launcher()

    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _reason(self) -> str:
        if self.signal is None and self._is_late():
            return f"stopped after train.max_hours={self._max_hours:g}"
        found = self.signal.name if self.signal else process_group.announced(self._announcement)
        return f"stopped on request ({found or 'of another rank, or the launcher has exited'})"


def _deepspeed_launcher() -> tuple[int, ...]:
    """Process ids of DeepSpeed's launcher, the parent of this rank, and of the ``deepspeed`` command, its parent.

    SIGTERM ends the ``deepspeed`` command only: its exit is a stop request, or the ranks would continue unattended. The
    exit of any other parent, such as a shell, is not.
    """
    parent = os.getppid()
    if not {"deepspeed.launcher.launch", "qvtune.distributed.node_launcher"} & set(_command(parent)):
        return ()
    grandparent = _parent(parent)
    return (parent, grandparent) if "deepspeed" in (Path(word).name for word in _command(grandparent)) else (parent,)


def _command(pid: int) -> list[str]:
    """Words of a process's command line; empty if there is no such process, or no /proc."""
    path = Path(f"/proc/{pid}/cmdline")
    try:
        return path.read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _parent(pid: int) -> int:
    """Process id of a process's parent; 0 where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
