"""A process that reads metrics.jsonl while a run writes it: ``qvtune.report.followers`` starts it.

It ends a while after the run, whether that tells it so or dies, and reads what has been written until then.
"""

import math
import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO, get_args

from qvtune.config.report import TrackerName
from qvtune.distributed.stop_signals import IGNORED_BY_CHILDREN

_LOOK_SECONDS = 0.5
_LOWEST_PRIORITY = 19


def _await_end(parent: int, wait_seconds: float, ended: threading.Event) -> None:
    """Wait until the parent writes to standard input, or is gone; after ``wait_seconds`` more SIGALRM ends the process.

    A file that is closed would say nothing: processes that the parent has forked have it open, too.
    """
    while os.getppid() == parent and not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        pass
    signal.alarm(math.ceil(wait_seconds))
    ended.set()


def _track(name: TrackerName, run_dir: Path, project: str, ended: threading.Event) -> int:
    from qvtune.report.send import Sender, keep_sending

    log = run_dir / "logs" / f"tracker-{name}.log"
    output = _own_output(log)

    def say(text: str) -> None:
        output.write(f"{name}: {text}; it is tried again, and the run goes on (more in {log})\n")

    return 0 if keep_sending(Sender(name, run_dir, project), ended, say) else 1


def _own_output(log: Path) -> TextIO:
    """The standard output as it is; what packages print from now on, and errors, are appended to ``log``."""
    console_output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    return console_output


def main(name: str, run_dir: Path, parent: int, wait_seconds: float, project: str) -> int:
    """Follow the run of the process ``parent``, which has started this one, and return the exit code.

    ``name``: that of a tracker, or report.html.
    """
    for number in IGNORED_BY_CHILDREN:  # blocked so far
        signal.signal(number, signal.SIG_IGN)
    os.nice(_LOWEST_PRIORITY)
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(parent, wait_seconds, ended), daemon=True).start()
    for tracker in get_args(TrackerName):
        if tracker == name:
            return _track(tracker, run_dir, project, ended)
    from qvtune.report.keep_page import keep_page

    keep_page(run_dir, ended)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]))
