"""Ranks that hang: each is ended by its watcher, and one message says which of them was last seen where."""

import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from qvtune.errors import HUNG_EXIT_CODE
from tests.launch.conftest import LAUNCHERS, TRAIN, command, without_gpu
from tests.launch.test_stop import _LONG, wait_until
from tests.support.forks import started_ranks
from tests.support.lab import Lab
from tests.support.processes import started

pytestmark = without_gpu

HOST = socket.gethostname()
_FOREVER = 300  # seconds that a call takes which hangs
WATCHED = f"""
import ctypes, os, sys, time
from pathlib import Path
from qvtune.distributed import heartbeat
from qvtune.distributed.hang import watched

def hang(kind):
    if kind == "sleep":
        time.sleep({_FOREVER})
    elif kind == "holds_the_lock":  # no other thread of Python runs meanwhile
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time it waits for itself
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    elif kind == "unlimited":
        with heartbeat.unlimited("a download"):
            time.sleep(7)
    else:
        for _ in range(int(kind)):
            time.sleep(0.2)
            heartbeat.beat()

with watched(Path(sys.argv[2]), 4.0):
    heartbeat.beat("step 7, micro-batch 1 of 2")
    open(sys.argv[2] + ".at-work", "w").close()
    hang(sys.argv[1])
print("done")
"""


def test_one_process_that_hangs_is_ended_and_others_are_not(tmp_path: Path) -> None:
    kinds = ["sleep", "holds_the_lock", "unlimited", "25"]
    commands: list[list[str | Path]] = [["-c", WATCHED, kind, tmp_path / kind] for kind in kinds]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started_ranks(words, 1, tmp_path / f"output-{kind}"))[0]
            for kind, words in zip(kinds, commands, strict=True)
        ]
        wait_until(lambda: (tmp_path / "25.at-work").exists(), seconds=120)
        # What a terminal does at Ctrl-Z, and later `fg`: rank and watcher stand still together.
        os.killpg(processes[3].pid, signal.SIGSTOP)
        time.sleep(6)
        os.killpg(processes[3].pid, signal.SIGCONT)
        codes = dict(zip(kinds, (process.wait() for process in processes), strict=True))
    errors = {kind: (tmp_path / f"output-{kind}" / "stderr-0.txt").read_text() for kind in kinds}
    assert codes == {"sleep": HUNG_EXIT_CODE, "holds_the_lock": -signal.SIGKILL, "unlimited": 0, "25": 0}, errors
    for kind in ("sleep", "holds_the_lock"):
        seen = rf"rank 0 on {HOST}: last seen at step 7, micro-batch 1 of 2, \d+ s ago; it is in <string>:"
        assert len(re.findall(seen, errors[kind])) == 1, errors[kind]
        (stacks,) = (tmp_path / kind).glob("stacks-*-rank-0.txt")
        assert re.search(r'File "<string>", line \d+ in hang', stacks.read_text())
    for kind in ("unlimited", "25"):
        assert errors[kind] == "" and not (tmp_path / kind).exists()


def test_a_stopped_rank_ends_all_ranks(lab: Lab) -> None:
    words, output = command(lab, "stopped", *_LONG, "train.hang_seconds=15"), lab.folder / "output" / "stopped"
    saved, logs = lab.run_dir("stopped") / "checkpoints" / "latest", lab.run_dir("stopped") / "logs"
    with started([*LAUNCHERS["deepspeed"], *words], output, **lab.environment) as launcher:
        wait_until(lambda: saved.exists() or launcher.poll() is not None, seconds=300)
        assert saved.exists(), (output / "stderr.txt").read_text()
        family = psutil.Process(launcher.pid).children(recursive=True)
        ranks = [process for process in family if str(TRAIN) == (process.cmdline() + [""] * 3)[2]]
        stopped = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
        stopped.send_signal(signal.SIGSTOP)
        psutil.wait_procs(family, timeout=60)
        assert not any(process.is_running() for process in family), "watchers end as well"
        assert launcher.wait(timeout=60) == HUNG_EXIT_CODE
    errors = (output / "stderr.txt").read_text()
    (message,) = re.findall(r"the run hangs.*\n(?:  .*\n)+", errors)
    found = re.search(rf"rank 1 on {HOST}: last seen at (.*), \d+ s ago; its process is stopped", message)
    assert found is not None and re.match(r"step \d+, micro-batch \d of \d|checkpoint of step \d+", found[1]), message
    assert "rank 0 on" not in message and "Traceback" not in errors
    assert [path.name.partition("rank")[2] for path in logs.glob("stacks-*")] == ["-0.txt"]
    (verdict,) = logs.glob("hang-*.json")
    assert json.loads(verdict.read_text())["hung"] == [{"rank": 1, "host": HOST}]
