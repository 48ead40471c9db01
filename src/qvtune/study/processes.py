"""The processes of a study's workers, and which GPUs or CPU cores each gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qvtune.distributed.local_ranks import rank_variables
from qvtune.errors import StopRequested, UserError

WORKER = ("-m", "qvtune.study.worker")


@dataclass(frozen=True)
class Share:
    """Of the machine, for one worker: its ranks, ``gpus`` ("2,3"; None on CPUs) and CPU threads per rank."""

    number: int
    num_ranks: int
    gpus: str | None
    threads: int


def shares(workers: int | None, ranks_per_cell: int, num_cells: int) -> list[Share]:
    """Shares for ``workers``; by default as many as fit, one rank for each GPU, or for each core where there is none.

    Raises UserError where there are not enough GPUs.
    """
    gpus, cores = _gpus(), len(os.sched_getaffinity(0))
    most = (len(gpus) or cores) // ranks_per_cell
    number = min(num_cells, workers if workers is not None else max(1, most))
    if gpus and number * ranks_per_cell > len(gpus):
        raise UserError(f"{number} workers of {ranks_per_cell} ranks need as many GPUs; this machine has {len(gpus)}")
    return [
        Share(
            number=index,
            num_ranks=ranks_per_cell,
            gpus=",".join(gpus[index * ranks_per_cell : (index + 1) * ranks_per_cell]) if gpus else None,
            threads=max(1, cores // max(1, number * ranks_per_cell)),
        )
        for index in range(number)
    ]


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has, or else all GPUs of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one for one in visible.split(",") if one]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class Worker:
    """The ranks of one worker, started again and again. Leave the context to end them.

    Attributes:
        cell: name of the cell that it trains; None between two.
        log: what its ranks print.
    """

    def __init__(self, study: Path, place: Share) -> None:
        self.place, self.log = place, study / "logs" / f"worker-{place.number}.log"
        self.cell: str | None = None
        self._study = study
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._read_end, self._rest, self._is_asked = -1, b"", False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._kill()
        self._close()

    @property
    def is_running(self) -> bool:
        """Whether it has been started and ``ended`` has not said otherwise."""
        return bool(self._ranks)

    def start(self) -> None:
        """Start all ranks. They lead sessions of their own: Ctrl-C is for the process that has started them."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._close()
        self.cell, self._rest = None, b""
        self._read_end, write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        command = [
            sys.executable,
            "-u",
            *WORKER,
            str(self._study),
            str(os.getpid()),
            str(write_end),
        ]
        with self.log.open("ab") as log:
            for environment in self._environments():
                self._ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[write_end],
                        start_new_session=True,
                    )
                )
        os.close(write_end)
        if self._is_asked:
            self._signal(signal.SIGTERM)

    def _environments(self) -> Iterator[dict[str, str]]:
        gpus = {} if self.place.gpus is None else {"CUDA_VISIBLE_DEVICES": self.place.gpus}
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.place.threads))}
        for variables in rank_variables(self.place.num_ranks):
            yield {**os.environ, **gpus, **threads, **variables}

    def events(self) -> list[dict[str, Any]]:
        """What it has reported since the last call: ``cell``, ``state`` (started, finished, failed), ``seconds``."""
        with suppress(BlockingIOError):
            while self._read_end >= 0 and (data := os.read(self._read_end, 65536)):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        found = [json.loads(line) for line in lines]
        for event in found:
            self.cell = event["cell"] if event["state"] == "started" else None
        return found

    def ended(self) -> int | None:
        """Once after each start, when the last rank has ended: 0, or the exit code of a rank that ended in another way;
        minus the signal that killed it. Else None."""
        codes = [rank.poll() for rank in self._ranks]
        failed = [code for code in codes if code not in (None, 0, StopRequested.exit_code)]
        if failed:
            self._kill()  # the others would wait for it
        elif None in codes or not codes:
            return None
        self._ranks = []
        return next(iter(failed), max(code or 0 for code in codes))

    def request_stop(self) -> None:
        """Once: let the ranks save and end."""
        if not self._is_asked:
            self._is_asked = True
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def _close(self) -> None:
        if self._read_end >= 0:
            os.close(self._read_end)
            self._read_end = -1
