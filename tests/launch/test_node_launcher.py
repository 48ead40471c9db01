"""The launcher that slurm/node.sh starts: Slurm signals it together with its rank."""

import base64
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.test_stop import wait_until
from tests.support.processes import started

# Exits with 75 at a stop signal, as a rank that has saved does. The file tells that it handles signals.
RANK = """
import os, sys, time
from qvtune.distributed.stop_signals import listen

listen(lambda number, seconds: os._exit(75))
open(sys.argv[1], "w").close()
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("to_rank", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGKILL, 256 - signal.SIGKILL)]
)
def test_it_returns_the_code_of_its_rank_whatever_signals_it_receives(
    tmp_path: Path, to_rank: signal.Signals, code: int
) -> None:
    ready, hosts = tmp_path / "ready", base64.urlsafe_b64encode(b'{"localhost": [0]}').decode()
    launched = [sys.executable, "-m", "qvtune.distributed.node_launcher", "--world_info", hosts, "--no_local_rank"]
    launched += ["--no_python", sys.executable, "-c", RANK, str(ready)]
    with started(launched, tmp_path / "output") as launcher:
        wait_until(lambda: ready.exists() or launcher.poll() is not None, seconds=120)
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.send_signal(signal.SIGUSR1)
        os.kill(rank.pid, to_rank)
        deadline = time.monotonic() + 60
        while launcher.poll() is None and time.monotonic() < deadline:
            launcher.send_signal(signal.SIGTERM)  # also while it ends
            time.sleep(0.01)
        assert launcher.returncode == code
