"""A rank that hangs ends all ranks, with one message that says which rank was last seen where.

Each rank leaves signs of life (heartbeat.py) in memory that it shares with its watcher, a process of its own
(hang_watcher.py). Watchers tell each other what they find in files of the run folder (hang_reports.py).
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from qvtune.distributed import heartbeat, process_group
from qvtune.distributed.hang_watcher import STACKS_SIGNAL, Watched
from qvtune.distributed.stop_signals import blocked_for_children
from qvtune.errors import HUNG_EXIT_CODE

_PART_OF_TIMEOUT = 0.9  # of a collective's timeout, whose own error would name no rank


@contextmanager
def watched(logs: Path, hang_seconds: float | None) -> Iterator[None]:
    """Within the block a rank that gives no sign of life for ``hang_seconds`` ends all ranks; collective.

    The exit code is HUNG_EXIT_CODE, or that of SIGKILL for a rank that cannot end by itself. A rank that waits for
    others in a collective is not to blame: it hangs only when all ranks wait, or shortly before the collective would
    time out. ``hang_seconds`` None: nobody watches. Stacks and reports are written to ``logs``.
    """
    if hang_seconds is None:
        yield
        return
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # under Slurm the name by which it is excluded
    ranks = process_group.all_gather_object((host, f"{time.time_ns()}"))
    beats, stacks = heartbeat.Heartbeat(), os.memfd_create("qvtune-stacks")
    waiting_seconds = _PART_OF_TIMEOUT * process_group.timeout().total_seconds()
    told = Watched(
        rank=process_group.rank(),
        hosts=[host for host, _ in ranks],
        logs=str(logs.absolute()),
        start=ranks[0][1],
        hang_seconds=min(hang_seconds, waiting_seconds),
        waiting_seconds=waiting_seconds,
        beats=beats.descriptor,
        stacks=stacks,
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )
    faulthandler.register(STACKS_SIGNAL, stacks)  # in C: it needs neither the main thread nor the interpreter's lock
    with heartbeat.shared(beats):
        watcher = _start(told)
        assert watcher.stdin is not None and watcher.stdout is not None
        threading.Thread(target=_end_when_told, args=(watcher.stdout,), name="watcher", daemon=True).start()
        try:
            yield
        finally:
            with suppress(BrokenPipeError):  # it has ended, or has been killed
                watcher.stdin.write(b".")  # closing would not do: processes that this one has forked hold it as well
            watcher.stdin.close()
            watcher.wait()
            faulthandler.unregister(STACKS_SIGNAL)
            os.close(stacks)


def _start(told: Watched) -> "subprocess.Popen[bytes]":
    with blocked_for_children():
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "qvtune.distributed.hang_watcher", json.dumps(asdict(told))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(told.beats, told.stacks),
        )


def _end_when_told(control: IO[bytes]) -> None:
    if control.read(1):
        os._exit(HUNG_EXIT_CODE)
    control.close()
