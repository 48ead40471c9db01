"""Checkpoints beside those of transformers' Trainer with DeepSpeed: python -m tests.benchmarks.checkpoint [--ranks 2]

Both train a LoRA of rank 16 on q and v of the embedded SmolLM2-135M (float32, not quantized, ZeRO-3) and save after
each short step. Bytes of one checkpoint; seconds by which a save delays the next step (median); seconds in which a
start that resumes loads what was saved, for this project with the comparison of all files with their checksums. The
largest of the ranks.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from tests.support.processes import run_ranks

WAYS = {"qvtune": "qvtune", "trainer": "Trainer + DeepSpeed"}


def main() -> None:
    """Measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qvtune-benchmark" / "checkpoint")
    arguments = parser.parse_args()
    model = model_folder("demo", cache_dir())
    table = Table(title=f"checkpoints of {arguments.ranks} ranks")
    for heading in ("", "bytes", "blocked s", "resume s"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, name in WAYS.items():
        costs = measure(kind, model, arguments.folder / kind, arguments.ranks, arguments.steps)
        seconds = (f"{costs[key]:.3f}" for key in ("blocked_seconds", "resume_seconds"))
        table.add_row(name, f"{costs['bytes']:,.0f}", *seconds)
    Console(width=100).print(table)


def measure(kind: str, model: Path, results: Path, num_ranks: int, steps: int) -> dict[str, float]:
    """What checkpoint_rank.py finds on ``num_ranks`` ranks, in an empty folder."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    command = [sys.executable, "-m", "tests.benchmarks.checkpoint_rank", kind, model, results, str(steps)]
    for one in run_ranks(command, num_ranks, results / "output", timeout=1800, OMP_NUM_THREADS=str(threads)):
        if one.code != 0:
            raise SystemExit(one.output)
    costs: dict[str, float] = json.loads((results / "costs.json").read_text())
    return costs


if __name__ == "__main__":
    main()
