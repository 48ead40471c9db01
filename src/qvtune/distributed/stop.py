"""Stopping on request: a signal to any rank becomes one exception, raised on all ranks at the same place.

SIGTERM, SIGINT and SIGUSR1 ask for it. One request often arrives as several signals: Ctrl-C gives SIGINT to the
launcher and to the ranks, and the launcher sends its ranks SIGTERM; Slurm signals the launcher and the ranks, and the
launcher passes it on. So what counts as the second request, which ends the process at once, is a signal of a kind
that came before, ``REPEAT_SECONDS`` or more after the first of that kind.
"""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

from qvtune.distributed import process_group
from qvtune.errors import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 3.0
_LOOK_SECONDS = 0.5  # between looks at what others have announced, which asks a server
_numbers = itertools.count()


class StopRequest:
    """Listens from its construction to the end of the process; make one for each run, on all ranks alike.

    A thread listens, since Python's own handlers wait until the main thread is back from a collective.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first_seconds: dict[signal.Signals, float] = {}
        self._announcement = f"qvtune/stop-{next(_numbers)}"
        self._next_look = 0.0
        self._launcher = _deepspeed_launcher()
        self._wakeup, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the number reaches the pipe before this is called
        signal.set_wakeup_fd(write_end)
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._wakeup, 64):
                if number in SIGNALS:
                    self._received(signal.Signals(number), time.monotonic())

    def _received(self, received: signal.Signals, seconds: float) -> None:
        if seconds - self._first_seconds.setdefault(received, seconds) >= REPEAT_SECONDS:
            os._exit(128 + received)
        if self.signal is None:
            self.signal = received
            # In a thread of its own: it waits for rank 0, which may hang, and the second request must get through.
            threading.Thread(
                target=process_group.announce, args=(self._announcement, received.name), daemon=True
            ).start()

    def poll(self) -> None:
        """Raises StopRequested on all ranks when one of them has been asked to stop; collective, without the device."""
        if process_group.any_rank(self._asked()):
            raise StopRequested(self._reason())

    def poll_alone(self) -> None:
        """The same for work of one rank inside ``process_group.raise_on_all_ranks``; cheap, so call it often."""
        now = time.monotonic()
        if self.signal is None and now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if self._asked() or process_group.announced(self._announcement):
            raise StopRequested(self._reason())

    def _asked(self) -> bool:
        return self.signal is not None or self._launcher != _deepspeed_launcher()

    def _reason(self) -> str:
        found = self.signal.name if self.signal else process_group.announced(self._announcement)
        return f"stopped on request ({found or 'of another rank, or the launcher has ended'})"


def _deepspeed_launcher() -> tuple[int, ...]:
    """Process ids of DeepSpeed's launcher, which has started this rank, and of the ``deepspeed`` that started that.

    A SIGTERM ends ``deepspeed`` alone: the ranks would train on without anybody who waits for them. Any other parent
    may end and leave the run alone, as a shell does.
    """
    parent = os.getppid()
    if "deepspeed.launcher.launch" not in _command(parent):
        return ()
    grandparent = _parent(parent)
    return (parent, grandparent) if "deepspeed" in (Path(word).name for word in _command(grandparent)) else (parent,)


def _command(pid: int) -> list[str]:
    """Words of a process's command line; none where there is no such process, or no /proc."""
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
