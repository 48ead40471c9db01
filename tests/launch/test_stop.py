"""Signals to launch/train.py under the real deepspeed launcher, which has its own way with each."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from qvtune.checkpoint.folder import complete_checkpoints, newest, verify
from qvtune.distributed.stop import REPEAT_SECONDS
from qvtune.errors import StopRequested
from tests.launch.conftest import TRAIN, without_gpu
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
    command = ["deepspeed", "--num_gpus", "2", TRAIN, "--config", lab.folder / "recipe.yaml"]
    with started(
        [*command, f"run_dir={lab.run_dir(name)}", *_LONG], lab.folder / "output" / name, **lab.environment
    ) as launcher:
        wait_until(lambda: newest(lab.run_dir(name) / "checkpoints") is not None, seconds=500)
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


def test_the_second_request_ends_a_rank_at_once_and_damages_nothing(lab: Lab) -> None:
    """One rank hangs, so that the other cannot stop as it should: it waits in a collective."""
    with running(lab, "twice") as (launcher, ranks):
        hanging, waiting = ranks
        hanging.suspend()
        waiting.send_signal(signal.SIGUSR1)
        time.sleep(REPEAT_SECONDS + 2)  # the first may be noticed a little late
        assert waiting.is_running() and waiting.status() != psutil.STATUS_ZOMBIE
        waiting.send_signal(signal.SIGUSR1)
        wait_until(lambda: not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE, seconds=10)
        hanging.kill()
        assert launcher.wait(timeout=60) not in (0, StopRequested.exit_code)
    for checkpoint in complete_checkpoints(lab.run_dir("twice") / "checkpoints"):
        verify(checkpoint)
    assert events(lab, "twice")[-1]["event"] != "run_end"
