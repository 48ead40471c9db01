"""A small process beside each rank, which notices that its rank hangs: ``qvtune.distributed.hang`` starts it.

A thread of the rank could not do this: it stands still while a call into C holds the interpreter's lock, and when the
process is stopped. Silence is counted in the looks that the watcher itself has taken, so that a computer that was
suspended, or a clock that jumps, is no hang.
"""

import linecache
import os
import re
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from qvtune.distributed.hang_reports import HangFiles, Report
from qvtune.distributed.heartbeat import Beat, Heartbeat
from qvtune.distributed.stop_signals import IGNORED_BY_CHILDREN

LOOK_SECONDS = 0.5
_FOLDER_SECONDS, _RANKS_PER_SECOND = 3.0, 32  # between looks into a folder that all hosts share; more with many ranks
_TOGETHER_SECONDS = 5.0  # from the verdict to the end of all ranks: who is earlier breaks the collectives of others
_GRACE_SECONDS = 5.0  # then to SIGKILL: ranks that can end by themselves are first, and give their launcher their code
_FILES_SECONDS = 30.0  # longer than this for a report: the file system of the run folder hangs as well
_DUMP_SECONDS = 5.0  # for a rank to write its stacks
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
# Where the innermost Python frame of a rank is that waits for others, or for a device on which a collective runs.
_WAITING = (
    *("/torch/distributed/", "/torch/cuda/", "/deepspeed/"),
    *("/qvtune/distributed/process_group.py", "/qvtune/model/gather.py"),
)
_SYNCHRONIZING = (".item()", "float(")

STACKS_SIGNAL = signal.SIGUSR2  # a rank writes its stacks


@dataclass(frozen=True)
class Watched:
    """What a watcher is told. ``waiting_seconds``: silence of a rank that waits for others, at which the run ends.

    ``beats`` and ``stacks``: inherited descriptors of the heartbeat, and of the file of the rank's stacks.
    """

    rank: int
    hosts: list[str]
    logs: str
    start: str
    hang_seconds: float
    waiting_seconds: float
    beats: int
    stacks: int
    job: str | None
    restart: int


class Watcher:
    """Watches the process ``pid``. ``look`` is called regularly; ``watch`` runs in a thread, as files may hang."""

    def __init__(self, watched: Watched, pid: int) -> None:
        self._watched, self._pid = watched, pid
        self._files = HangFiles(Path(watched.logs), watched.start, watched.hosts)
        self._heartbeat = Heartbeat(watched.beats)
        self._beat = self._heartbeat.read()
        self._silent_seconds = 0.0
        self._looked = time.monotonic()
        self._found: tuple[int, Report] | None = None  # number of the last beat, and what was reported after it
        self._is_ending = False
        self._complaint = ""

    def look(self) -> None:
        """Note whether the rank has given a sign of life; end it where its silence cannot be reported any more."""
        now = time.monotonic()
        beat = self._heartbeat.read()
        if beat.number != self._beat.number:
            self._beat, self._silent_seconds = beat, 0.0
        else:
            self._silent_seconds += min(now - self._looked, 2 * LOOK_SECONDS)
        self._looked = now
        late = self._silent_seconds - self._watched.waiting_seconds > _FILES_SECONDS
        if late and beat.is_limited and not self._is_ending:
            sys.stderr.write(f"rank {self._watched.rank} hangs at {beat.where}, and so does {self._watched.logs}\n")
            self._end()

    def watch(self) -> None:
        """Report the rank's silence, look for a verdict, and end the rank where there is one."""
        interval = max(_FOLDER_SECONDS, len(self._watched.hosts) / _RANKS_PER_SECOND)
        looked = -interval
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self._report()
                if time.monotonic() - looked >= interval:
                    looked = time.monotonic()
                    if self._files.verdict.exists() or self._is_over():
                        break
            except OSError as error:
                self._complain(error)
        self._is_ending = True
        if self._found is not None:
            self._give_verdict(self._found[1])
        self._dump()
        self._await_others()
        self._end()

    def _report(self) -> None:
        """Report the rank once it is silent for longer than it may be, and withdraw that when it is alive again."""
        beat, found = self._beat, self._found
        if self._silent_seconds <= self._watched.hang_seconds or not (beat.is_limited or self._is_stopped()):
            if found is not None:
                self._found = None
                self._files.withdraw(self._watched.rank)
        elif found is None or found[0] != beat.number or (found[1].is_waiting and self._is_stopped()):
            self._found = beat.number, self._describe(beat)
            self._files.report(self._found[1])

    def _complain(self, error: OSError) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            sys.stderr.write(f"the watcher of rank {self._watched.rank}: {error}\n")

    def _describe(self, beat: Beat) -> Report:
        if self._is_stopped():
            does, is_waiting = "its process is stopped (SIGSTOP), so that it cannot write its stacks", False
        elif (stacks := self._dump()) is None:
            does, is_waiting = "its process does not answer signals, so that it cannot write its stacks", False
        else:
            frames = innermost_frames(stacks)
            is_waiting = any(map(waits, frames))
            does = "it waits for other ranks" if is_waiting else f"it is in {frames[-1] if frames else 'unknown code'}"
        own = self._watched
        return Report(own.rank, own.hosts[own.rank], beat.where, self._silent_seconds, does, is_waiting)

    def _is_over(self) -> bool:
        """Whether the rank is silent and nobody is left for whom the silent ranks could wait."""
        if self._found is None:
            return False
        if not self._found[1].is_waiting or self._silent_seconds > self._watched.waiting_seconds:
            return True
        reports = self._files.reports()
        return len(reports) == len(self._watched.hosts) and all(one.is_waiting for one in reports)

    def _give_verdict(self, found: Report) -> None:
        try:
            message = self._files.write_verdict(self._files.reports(), self._watched.job, self._watched.restart)
        except OSError as error:
            message = f"{found.text}; the other ranks cannot be told ({error})"
        if message is not None:
            sys.stderr.write(f"{message}\n")

    def _await_others(self) -> None:
        """Until _TOGETHER_SECONDS after the verdict, where there are others."""
        if len(self._watched.hosts) == 1:
            return
        try:
            seconds = self._files.verdict.stat().st_mtime + _TOGETHER_SECONDS - time.time()
        except OSError as error:
            self._complain(error)
            return
        time.sleep(min(max(seconds, 0.0), _TOGETHER_SECONDS))

    def _is_stopped(self) -> bool:
        return _state(self._pid) in ("T", "t")

    def _dump(self) -> str | None:
        """Let the rank write its stacks, and keep them; None where it does not."""
        stacks = self._watched.stacks
        start = os.fstat(stacks).st_size
        if self._is_stopped():
            return None
        os.kill(self._pid, STACKS_SIGNAL)
        size, deadline = start, time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            before, size = size, os.fstat(stacks).st_size
            if size == before > start:
                break
        if size == start:
            return None
        text = os.pread(stacks, size - start, start).decode(errors="replace")
        path = self._files.stacks(self._watched.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"rank {self._watched.rank} at {self._beat.where}\n{text}", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"{error}\n{text}")
        return text

    def _end(self) -> None:
        """End the rank: by itself, with its own exit code, where it can; else by SIGKILL, which a stopped one obeys."""
        self._is_ending = True
        os.write(sys.stdout.fileno(), b"x")
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and os.getppid() == self._pid:
            time.sleep(0.1)
        if os.getppid() == self._pid:
            os.kill(self._pid, signal.SIGKILL)


def innermost_frames(stacks: str) -> list[str]:
    """``FILE:LINE FUNCTION`` of each thread in what faulthandler has written; the main thread is the last one."""
    found = []
    for thread in stacks.strip().split("\n\n"):
        if (match := _FRAME.search(thread)) is not None:
            found.append(f"{match[1]}:{match[2]} {match[3]}")
    return found


def waits(frame: str) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks, or for the device."""
    path, line = frame.split(" ")[0].rsplit(":", 1)
    source = linecache.getline(path, int(line))
    return any(part in path for part in _WAITING) or any(call in source for call in _SYNCHRONIZING)


def _state(pid: int) -> str:
    """One letter, see proc(5); empty where there is no such process, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main(watched: Watched) -> None:
    """Watch the process that has started this one, until it ends or writes to this one's standard input."""
    for number in IGNORED_BY_CHILDREN:  # blocked so far: a watcher ends with its rank
        signal.signal(number, signal.SIG_IGN)
    pid = os.getppid()
    watcher = Watcher(watched, pid)
    threading.Thread(target=watcher.watch, daemon=True).start()
    while os.getppid() == pid and not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        watcher.look()
    os._exit(0)  # the thread may hang in the file system


if __name__ == "__main__":
    import json

    main(Watched(**json.loads(sys.argv[1])))
