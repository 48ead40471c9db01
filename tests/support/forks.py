"""A warm interpreter, of which the processes of tests are forks.

Importing torch, DeepSpeed, transformers and PEFT takes ten seconds of CPU time. The fork server imports them once for
all tests; a command that would start ``python`` is then a fork of it, which runs the same script with the arguments,
environment, output files and session of its own that a new process has. The differences that remain: what libraries
read from the environment when they are imported is the same for all forks (``ENVIRONMENT``), and so is the seed of
string hashes, hence the order of sets. What tests a launcher starts real processes (tests/support/processes.py).

``python -m tests.support.forks FD`` is the server; it serves requests from this socket until it is closed.
"""

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qvtune.system import heavy_imports
from tests.support.processes import REPOSITORY, Finished, kill, own_environment, rank_environments, run_all

WARM = (
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "peft",
    "safetensors.torch",
    "torch.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "qvtune.train.loop",
)
# Read by libraries when they are imported: the same for all forks.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # bitsandbytes compiles its fallback for shapes that only tiny models have: half of a short run's time.
    "TORCH_COMPILE_DISABLE": "1",
}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fork_command(command: Sequence[str | Path], folder: Path, *, timeout: float, **environment: str) -> Finished:
    """``run_command`` with a fork. ``command`` is what follows ``python``: SCRIPT, ``-m MODULE`` or ``-c CODE``."""
    return run_all([command], [environment], folder, timeout, start=_server().start)[0]


def fork_ranks(
    command: Sequence[str | Path], num_ranks: int, folder: Path, *, timeout: float, **environment: str
) -> list[Finished]:
    """``run_ranks`` with forks."""
    environments = rank_environments(num_ranks, environment)
    return run_all([command] * num_ranks, environments, folder, timeout, start=_server().start)


@contextmanager
def started_ranks(
    command: Sequence[str | Path], num_ranks: int, folder: Path, **environment: str
) -> Iterator[list["Fork"]]:
    """The ranks of a command that runs meanwhile; at the end they and all their children are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    with ExitStack() as stack:
        for rank, own in enumerate(rank_environments(num_ranks, environment)):
            fork = _server().start(command, own, folder / f"stdout-{rank}.txt", folder / f"stderr-{rank}.txt")
            stack.callback(kill, fork)
            ranks.append(fork)
        yield ranks


@cache
def _server() -> "ForkServer":
    return ForkServer()


def stop_server() -> None:
    """End the server, where one has been started, and whatever it has forked; once, after all tests."""
    if _server.cache_info().currsize:
        _server().stop()


class Fork:
    """A process that the server has forked, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"wait_for": self.pid, "block": False})
        return self.returncode

    def wait(self) -> int | None:
        """Until it has ended."""
        if self.returncode is None:
            self.returncode = self._server.ask({"wait_for": self.pid, "block": True})
        return self.returncode


class ForkServer:
    """The tests' end of the server process."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        own, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks", str(its.fileno())],
                cwd=REPOSITORY,
                env=own_environment(ENVIRONMENT),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[its.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests, which then end the server
            )
        self._socket = own.makefile("rw", encoding="utf-8")
        own.close()

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str], out: Path, err: Path) -> Fork:
        """Fork a process that leads a session of its own, in the repository's folder, with empty standard input."""
        changed = {key for key in ENVIRONMENT if environment.get(key, ENVIRONMENT[key]) != ENVIRONMENT[key]}
        assert not changed, f"{changed} are read at import: start a real process (run_command, run_ranks)"
        request = {
            "command": [str(word) for word in command],
            "place": {
                "environment": own_environment(environment) | ENVIRONMENT,
                "stdout": str(out),
                "stderr": str(err),
            },
        }
        return Fork(self, self.ask(request))

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The server's answer to one request."""
        try:
            self._socket.write(json.dumps(request) + "\n")
            self._socket.flush()
            answer = self._socket.readline()
        except ConnectionError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"the fork server has ended:\n{self._log.read().decode(errors='replace')[-6000:]}")
        return json.loads(answer)

    def stop(self) -> None:
        """End the server and whatever it has forked."""
        self._socket.close()
        self._process.wait()
        self._log.close()


# ---- in the server


def main() -> None:
    """Serve; in a fork: run its command, and end as any interpreter does."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with heavy_imports():  # no fork scans, and so copies, the memory of what all share when it collects garbage
        for name in WARM:
            import_module(name)
    # A fork has no other threads; what they have locked stays locked. pyarrow's allocator provides for that.
    threads = {task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")} - {"jemalloc_bg_thd"}
    assert len(threads) == 1, threads
    command = _serve(connection)
    if command is not None:
        connection.close()
        _run(command)


def _serve(connection: socket.socket) -> list[str] | None:
    """Answer requests until the tests close the connection, then end all forks. In a fork: returns its command."""
    running: set[int] = set()
    for line in connection.makefile(encoding="utf-8"):
        request = json.loads(line)
        if "command" in request:
            pid = os.fork()
            if pid == 0:
                _enter(**request["place"])
                _answer(connection, os.getpid())  # from here on its session can be killed
                command: list[str] = request["command"]
                return command
            running.add(pid)
        else:
            pid, status = os.waitpid(request["wait_for"], 0 if request["block"] else os.WNOHANG)
            running.discard(pid)
            _answer(connection, os.waitstatus_to_exitcode(status) if pid else None)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _answer(connection: socket.socket, value: int | None) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _enter(environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Give this fork what a new process gets from the one that starts it."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for descriptor, path in enumerate((os.devnull, stdout, stderr)):
        file = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)


def _run(command: Sequence[str]) -> None:
    """Run ``SCRIPT ...``, ``-m MODULE ...`` or ``-c CODE ...`` as ``python`` does."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        main_module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
