"""In place of qvtune.study.worker: does what the names of cells say, and takes no time. FAKE.py STUDY PARENT FD"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from qvtune.study.cell import cell_folder, read_cells
from qvtune.study.worker import claim, write_failure


def main() -> int:
    study, descriptor = Path(sys.argv[1]), int(sys.argv[3])
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    while True:
        with ExitStack() as held:
            cell = claim(study, read_cells(study), held)
            if cell is None:
                return 0
            _report(descriptor, cell.name, "started")
            folder = cell_folder(study, cell)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "starts").open("a") as file:
                file.write(f"{os.getpid()}\n")
            first = len((folder / "starts").read_text().split()) == 1
            if "dies" in cell.name and (first or "once" not in cell.name):
                os.kill(os.getpid(), signal.SIGKILL)
            if "fails" in cell.name:
                write_failure(study, cell, "data.train: no such file")
                _report(descriptor, cell.name, "failed")
                continue
            if "breaks" in cell.name:
                write_failure(study, cell, "Traceback\nRuntimeError: step 3: the loss is nan")
                return 1
            for _ in range(3000 if "slowest" in cell.name else 100 if "slow" in cell.name else 5):
                time.sleep(0.02)
                if stopped or os.getppid() != int(sys.argv[2]):
                    return 75
            events = [{"event": "eval", "step": 1, "loss": len(cell.name)}]
            events += [{"event": "run_end", "step": 1, "reason": "completed"}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
            _report(descriptor, cell.name, "finished")


def _report(descriptor: int, cell: str, state: str) -> None:
    os.write(descriptor, f"{json.dumps({'cell': cell, 'state': state, 'seconds': 0.1})}\n".encode())


sys.exit(main())
