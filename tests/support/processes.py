"""Starting the processes of a test, and ending exactly these."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both, for the message of a failed assertion."""
        return f"exit code {self.code}\n--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk without room: what this process writes behind so many bytes of a file is an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_command(command: Sequence[str | Path], folder: Path, *, timeout: float, **environment: str) -> Finished:
    """Run one command (a launcher, say) in the repository; its output lies in ``folder`` as well.

    Raises TimeoutError after ``timeout`` seconds, when the command and all its children have been killed.
    """
    return run_all([command], [environment], folder, timeout)[0]


def run_ranks(
    command: Sequence[str | Path], num_ranks: int, folder: Path, *, timeout: float, **environment: str
) -> list[Finished]:
    """Run a command once for each rank, with the variables that launchers set.

    When a rank fails the others are killed, as launchers do; their codes are then -9. Raises as ``run_command``.
    """
    return run_all([command] * num_ranks, rank_environments(num_ranks, environment), folder, timeout)


def rank_environments(num_ranks: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """``environment`` and what launchers add to it, for each rank of one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


class Process(Protocol):
    """A process that leads a session of its own: ``subprocess.Popen``, or a fork (tests/support/forks.py)."""

    pid: int

    @property
    def returncode(self) -> Any: ...

    def poll(self) -> int | None: ...

    def wait(self) -> object: ...


Start = Callable[[Sequence[str | Path], Mapping[str, str], Path, Path], Process]


def killed(action: Callable[[], object]) -> bool:
    """Whether ``action``, in a copy of this process, killed it; an error of the action is one of the test."""
    process = os.fork()
    if not process:
        code = 1
        try:
            action()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == -signal.SIGKILL


@contextmanager
def started(command: Sequence[str | Path], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs meanwhile, in a session of its own; at the end it and all its children are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    process = _start(command, environment, folder / "stdout.txt", folder / "stderr.txt")
    try:
        yield process
    finally:
        kill(process)


def run_all(
    commands: Sequence[Sequence[str | Path]],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    timeout: float,
    start: Start | None = None,
) -> list[Finished]:
    """Run commands at the same time until all have ended, or one has failed and the others have been killed.

    ``start`` makes a process of a command, its variables and its two output files; by default a new one. Raises
    TimeoutError after ``timeout`` seconds, when all have been killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [(folder / f"stdout-{index}.txt", folder / f"stderr-{index}.txt") for index in range(len(commands))]
    processes: list[Process] = []
    with ExitStack() as stack:
        for command, environment, (out, err) in zip(commands, environments, outputs, strict=True):
            processes.append((start or _start)(command, environment, out, err))
            stack.callback(kill, processes[-1])
        in_time = _wait(processes, timeout)
        if not in_time:
            _show_where_they_hang(processes)
    finished = [
        Finished(process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace"))
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]
    if not in_time:
        raise TimeoutError(f"after {timeout} s\n" + "\n".join(one.output for one in finished))
    return finished


def _start(
    command: Sequence[str | Path], environment: Mapping[str, str], out: Path, err: Path
) -> subprocess.Popen[bytes]:
    with out.open("wb") as stdout, err.open("wb") as stderr:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=REPOSITORY,
            env=own_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # so that a launcher's children can be killed with it
        )


def own_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This one's, without what would make a process part of another run; launchers look for ``python`` on PATH."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key == "QVTUNE_CACHE" or not key.startswith(("SLURM_", "QVTUNE_", "MASTER_"))
    }
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        inherited.pop(key, None)
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "CUDA_VISIBLE_DEVICES": "",  # the same test everywhere
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",
    }
    return {**inherited, **own, **extra}


def _wait(processes: Sequence[Process], timeout: float) -> bool:
    """Until all have ended, or one has failed and the others would wait for it; returns whether that was in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return True
        time.sleep(0.05)
    return False


def _show_where_they_hang(processes: Sequence[Process]) -> None:
    """Python prints the stack of each thread on SIGABRT (PYTHONFAULTHANDLER)."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGABRT)
    _wait(processes, timeout=5)


def kill(process: Process) -> None:
    """End the process and whatever it has started; it leads a session of its own."""
    with suppress(ProcessLookupError):  # the whole group has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
