"""One rank of the real command with a fault in it: python -m tests.faults.rank FOLDER SCRIPT ARGUMENT ...

FOLDER/fault.json is the fault, if there is one; FOLDER/pid-N is made for each rank; FOLDER/struck-N when it has struck;
and FOLDER/counts-N.json has the number of events by phase when the command has ended.
"""

import errno
import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvtune.distributed import heartbeat
from qvtune.train import loop
from tests.faults.kinds import PHASES, SAVE, Fault

_ERRNO = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
_FILE_EVENTS = ("os.rename", "os.mkdir", "os.symlink", "os.chmod", "fsync")
_DELETIONS = ("os.remove", "os.rmdir")  # a full disk allows them
_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "two signals": signal.SIGTERM}


class Injector:
    """Counts events by phase and does the fault at its event."""

    def __init__(self, folder: Path, rank: int, fault: Fault | None, run_dir: str) -> None:
        self._folder, self._rank, self._run_dir = folder, rank, run_dir
        self._fault = fault if fault is not None and fault.rank == rank else None
        self.counts: Counter[str] = Counter()
        self._left_to_fail = 0
        (folder / f"pid-{rank}").write_text(str(os.getpid()))

    def install(self) -> None:
        """From now on events are counted."""
        write, train_on = heartbeat._write, loop.train_on

        def beat(where: str, is_limited: bool) -> None:
            write(where, is_limited)
            self.event(next((phase for words, phase in PHASES.items() if where.startswith(words)), "other"))

        def maybe_nan(batch: Any, engine: Any, scale: float) -> Any:
            kind = self._fault.kind if self._fault is not None else ""
            if not kind.startswith("NaN") or not (self._folder / f"struck-{self._rank}").exists():
                return train_on(batch, engine, scale)
            loss = train_on(batch, engine, scale * float("nan") if kind == "NaN gradient" else scale)
            return loss * float("nan") if kind == "NaN loss" else loss

        heartbeat._write, loop.train_on = beat, maybe_nan
        fsync = os.fsync

        def audited(descriptor: int) -> None:
            sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        os.fsync = audited  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in _FILE_EVENTS or event in _DELETIONS):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if not path.startswith((f"{self._run_dir}/checkpoints", f"{self._run_dir}/.owner-")):
            return
        self.event(SAVE)
        if self._left_to_fail > 0 and not (self._fault.kind == "ENOSPC" and event in _DELETIONS):  # type: ignore[union-attr]
            self._left_to_fail -= 1
            number = _ERRNO[self._fault.kind]  # type: ignore[union-attr]
            raise OSError(number, os.strerror(number), path)

    def event(self, phase: str) -> None:
        """Something happens in ``phase``."""
        number, fault = self.counts[phase], self._fault
        self.counts[phase] += 1
        if fault is not None and (phase, number) == (fault.phase, fault.nth):
            (self._folder / f"struck-{self._rank}").touch()
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        own, everyone = [os.getpid()], [self._pid(rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
        if fault.kind == "kill all ranks":
            everyone.sort(key=own[0].__eq__)  # itself last
            self._send(signal.SIGKILL, everyone)
        elif fault.kind in _SIGNALS:
            self._send(_SIGNALS[fault.kind], everyone if fault.to_all else own)
            if fault.kind == "two signals":
                time.sleep(fault.amount)
                self._send(signal.SIGUSR1, everyone if fault.to_all else own)
        elif fault.kind in ("SIGSTOP", "stale writer"):
            self._send(signal.SIGSTOP, own)
        elif fault.kind in _ERRNO:
            self._left_to_fail = int(fault.amount)
        elif fault.kind == "clock":
            self._jump(fault.amount)
        elif not fault.kind.startswith("NaN"):
            self._send(signal.SIGKILL, own)

    def _pid(self, rank: int) -> int:
        path = self._folder / f"pid-{rank}"
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        return int(path.read_text())

    def _send(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, number)

    def _jump(self, seconds: float) -> None:
        """The wall clock of this rank is set: what is measured with ``time.monotonic`` must not notice."""
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def main() -> None:
    """Install, run, and leave the counts."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    path = folder / "fault.json"
    fault = Fault(**json.loads(path.read_text())) if path.exists() else None
    run_dir = next(word for word in sys.argv if word.startswith("run_dir=")).removeprefix("run_dir=")
    injector = Injector(folder, rank, fault, run_dir)
    injector.install()
    sys.argv = sys.argv[2:]
    run: Callable[..., Any] = runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    finally:
        (folder / f"counts-{rank}.json").write_text(json.dumps(injector.counts))


if __name__ == "__main__":
    main()
