"""Signals to launch/train.py, most of them under the real deepspeed launcher, which has its own way with each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from qvtune.checkpoint.folder import complete_checkpoints, newest, verify
from qvtune.distributed.stop_signals import REPEAT_SECONDS, SIGNALS
from qvtune.errors import StopRequested
from tests.launch.conftest import LAUNCHERS, TRAIN, command, without_gpu
from tests.support.forks import started_ranks
from tests.support.lab import Lab
from tests.support.processes import started

pytestmark = without_gpu

_LONG = ["train.max_steps=100000", "train.save_every=2", "data.eval=null", "checkpoint.keep=1"]


@pytest.fixture(autouse=True)
def _ctrl_c_reaches_children() -> Iterator[None]:
    """What a shell has started in the background ignores it, and so does all that comes from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def running(lab: Lab, name: str) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """The launcher and its two ranks, in the middle of a run that takes hours."""
    launched = [*LAUNCHERS["deepspeed"], *command(lab, name, *_LONG)]
    with started(launched, lab.folder / "output" / name, **lab.environment) as launcher:
        wait_until(lambda: launcher.poll() is not None or newest(lab.run_dir(name) / "checkpoints") is not None, 500)
        assert launcher.poll() is None, (lab.folder / "output" / name / "stderr.txt").read_text()
        family = psutil.Process(launcher.pid).children(recursive=True)
        ranks = [process for process in family if str(TRAIN) == (process.cmdline() + [""] * 3)[2]]
        assert len(ranks) == 2, [process.cmdline() for process in family]
        yield launcher, ranks


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def events(lab: Lab, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (lab.run_dir(name) / "metrics.jsonl").read_text().splitlines()]


def assert_clean(lab: Lab, name: str) -> None:
    """The record says so, and the newest checkpoint, which is whole, is that of its last step."""
    end = events(lab, name)[-1]
    assert (end["event"], end["reason"]) == ("run_end", "stopped")
    found = newest(lab.run_dir(name) / "checkpoints")
    assert found is not None and found.name == f"step-{end['step']:08d}"
    verify(found)


# What is done to a run -> the launcher's exit code. Only when it is left alone it has that of the ranks.
REQUESTS: dict[str, tuple[Callable[[subprocess.Popen[bytes], list[psutil.Process]], None], int]] = {
    "usr1_to_one_rank": (lambda launcher, ranks: ranks[1].send_signal(signal.SIGUSR1), 75),
    "ctrl_c": (lambda launcher, ranks: os.killpg(launcher.pid, signal.SIGINT), -signal.SIGINT),
    "term_to_all": (lambda launcher, ranks: os.killpg(launcher.pid, signal.SIGTERM), -signal.SIGTERM),
    "term_to_deepspeed_alone": (lambda launcher, ranks: launcher.send_signal(signal.SIGTERM), -signal.SIGTERM),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_leaves_a_complete_checkpoint(lab: Lab, name: str) -> None:
    request, code = REQUESTS[name]
    with running(lab, name) as (launcher, ranks):
        request(launcher, ranks)
        psutil.wait_procs(ranks, timeout=60)
        assert not any(rank.is_running() for rank in ranks)
        assert launcher.wait(timeout=60) == code
    assert_clean(lab, name)


# Holds a process at its import of torch until a file exists. Python imports this module before any other.
HOLD_AT_TORCH = """
import os, sys, time

class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            open(os.environ["TEST_HELD"], "w").close()
            while not os.path.exists(os.environ["TEST_RELEASED"]):
                time.sleep(0.05)

sys.meta_path.insert(0, Hold())
"""


def test_a_request_during_the_imports_is_remembered(lab: Lab) -> None:
    """Exit code and message are those of a request before the first step, and the run folder is untouched."""
    site = lab.folder / "hold"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOLD_AT_TORCH)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    released = lab.folder / "released"
    with ExitStack() as stack:
        processes = {}
        for number in SIGNALS:
            output = lab.folder / "output" / f"early-{number.name}"
            launched = [sys.executable, *command(lab, output.name)]
            hold = {"PYTHONPATH": path, "TEST_HELD": f"{output}.held", "TEST_RELEASED": str(released)}
            processes[output] = (number, stack.enter_context(started(launched, output, **lab.environment, **hold)))
        for output, (number, process) in processes.items():
            wait_until(lambda held=Path(f"{output}.held"): held.exists(), seconds=60)  # type: ignore[misc]
            assert all(has_handler(process.pid, each) for each in SIGNALS)
            process.send_signal(number)
        released.touch()
        for output, (number, process) in processes.items():
            assert process.wait(timeout=120) == StopRequested.exit_code, (output / "stderr.txt").read_text()
            message = f"stopped on request ({number.name}) before the first step; there was nothing to save"
            assert message in (output / "stderr.txt").read_text()
            assert "Traceback" not in (output / "stderr.txt").read_text()
            assert not lab.run_dir(output.name).exists()


def has_handler(pid: int, number: int) -> bool:
    """Whether a process has installed a handler for a signal: in the mask SigCgt of /proc."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


def test_the_second_request_ends_a_rank_at_once_and_damages_nothing(lab: Lab) -> None:
    """One rank hangs, so that the other cannot stop as it should: it waits in a collective."""
    words, output = command(lab, "twice", *_LONG), lab.folder / "output" / "twice"
    with started_ranks(words, 2, output, **lab.environment) as (hanging, waiting):
        wait_until(lambda: newest(lab.run_dir("twice") / "checkpoints") is not None, seconds=500)
        os.kill(hanging.pid, signal.SIGSTOP)
        os.kill(waiting.pid, signal.SIGUSR1)
        time.sleep(REPEAT_SECONDS + 2)  # the first may be noticed a little late
        assert waiting.poll() is None
        os.kill(waiting.pid, signal.SIGUSR1)
        wait_until(lambda: waiting.poll() is not None, seconds=10)
        assert waiting.returncode == 128 + signal.SIGUSR1
        assert hanging.poll() is None
    for checkpoint in complete_checkpoints(lab.run_dir("twice") / "checkpoints"):
        verify(checkpoint)
    assert events(lab, "twice")[-1]["event"] != "run_end"
