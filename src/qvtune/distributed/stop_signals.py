"""The signals that request a stop, recorded from the start of a command until ``StopRequest`` handles them.

Python first imports torch, transformers and DeepSpeed for about ten seconds. Without a handler SIGUSR1 would kill the
process in that time; under slurm/node.sh the signals are blocked until then. This module imports nothing that takes
time.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IGNORED_BY_CHILDREN = (*SIGNALS, signal.SIGHUP)
REPEAT_SECONDS = 3.0
STOP_FILE = "QVTUNE_STOP_FILE"  # variable: a file to which slurm/node.sh writes the name of a signal it has received

Received = Callable[[signal.Signals, float], None]  # a signal, and time.monotonic() of its arrival

_recorded: dict[signal.Signals, float] = {}  # the first of each kind


def record_stop_signals() -> None:
    """Record stop signals from now on. A second request ends the process at once, as with ``StopRequest``.

    The handler records them, in the main thread, which also takes them. The thread that listens may come to a signal
    after it has been taken, and would record it once more: as a request to the next run.
    """
    first_seconds: dict[signal.Signals, float] = {}
    listen(
        lambda number, seconds: end_at_second_request(first_seconds, number, seconds),
        lambda number: _recorded.setdefault(number, first_seconds.get(number, time.monotonic())),
    )


def take_recorded() -> dict[signal.Signals, float]:
    """The recorded signals with their times of arrival; the record is empty afterwards.

    Includes a signal that arrived before this process had a handler, if slurm/node.sh has received it.
    """
    recorded = dict(_recorded)
    _recorded.clear()
    path = os.environ.get(STOP_FILE)
    if path and Path(path).exists():
        name = Path(path).read_text(encoding="utf-8").strip()
        number = next((one for one in SIGNALS if one.name == name), signal.SIGUSR1)
        recorded.setdefault(number, time.monotonic())
    return recorded


def listen(received: Received, handler: Callable[[signal.Signals], object] = lambda number: None) -> None:
    """Call ``received`` in a thread of its own for every stop signal from now on.

    Python's signal handlers, and so ``handler``, run only once the main thread has returned from a collective.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)  # Python writes each signal's number to the pipe before it calls the handler
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: handler(signal.Signals(number)))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by qvtune.distributed.node_launcher

    def read() -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in SIGNALS:
                    received(signal.Signals(number), time.monotonic())

    threading.Thread(target=read, name="stop signals", daemon=True).start()


@contextmanager
def blocked_for_children() -> Iterator[None]:
    """A process that is started within the block has IGNORED_BY_CHILDREN blocked, until it ignores them.

    For one that ends with this process: Slurm and terminals send these signals to all processes of a run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_BY_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_second_request(first_seconds: dict[signal.Signals, float], number: signal.Signals, seconds: float) -> None:
    """End the process at a signal of a kind that arrived REPEAT_SECONDS or more before; else note its arrival."""
    if seconds - first_seconds.setdefault(number, seconds) >= REPEAT_SECONDS:
        os._exit(128 + number)
