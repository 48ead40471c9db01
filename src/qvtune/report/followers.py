"""Starts and ends the processes that follow a run: one keeps its report up to date, and one feeds each tracker."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qvtune.config.report import ReportSection
from qvtune.console import console
from qvtune.distributed import heartbeat
from qvtune.distributed.stop_signals import blocked_for_children
from qvtune.report.run_page import REPORT

_GRACE_SECONDS = 5.0  # for a process that SIGALRM ends

_Process = subprocess.Popen[bytes]


@contextmanager
def followers(run_dir: Path, settings: ReportSection) -> Iterator[None]:
    """Within the block processes of low priority read ``run_dir/metrics.jsonl``, which must be there; for rank 0 alone.

    At its end they get ``settings.wait_seconds`` to finish. What goes wrong with them is said, and does nothing else.
    """
    names = [*([REPORT] if settings.html else []), *settings.trackers]
    processes = {name: process for name in names if (process := _start(name, run_dir, settings)) is not None}
    try:
        yield
    finally:
        with heartbeat.unlimited("wait for the report and the trackers of the run"):
            _end(processes, run_dir, settings)


def _start(name: str, run_dir: Path, settings: ReportSection) -> _Process | None:
    command = [sys.executable, "-P", "-m", "qvtune.report.follow", name, str(run_dir), str(os.getpid())]
    try:
        with blocked_for_children():
            own = [str(settings.wait_seconds), settings.project]
            return subprocess.Popen([*command, *own], stdin=subprocess.PIPE, bufsize=0)
    except OSError as error:
        console().print(f"{name}: its process cannot be started ({error}); the run goes on without", markup=False)
        return None


def _end(processes: dict[str, _Process], run_dir: Path, settings: ReportSection) -> None:
    for process in processes.values():
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(b".")  # closing would not do: processes that this one has forked hold it as well
        process.stdin.close()
    deadline = time.monotonic() + settings.wait_seconds + _GRACE_SECONDS
    for name, process in processes.items():
        try:
            code = process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:  # it waits for a disk
            code = None
        if code != 0:
            how = "has not ended in time" if code is None else f"ended with code {code}"
            command = f"python -m qvtune.report {run_dir}"
            rest = f"it may be incomplete; to write it: {command}"
            if name != REPORT:
                rest = f"it may not have everything; the rest is sent at the next start, or by {command} --send {name}"
            console().print(f"{name}: its process {how}; {rest}", markup=False, soft_wrap=True)
