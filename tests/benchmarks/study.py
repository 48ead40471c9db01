"""Cells per hour of launch/study.py grid beside those of one `deepspeed launch/train.py` per cell, on a tiny model.

    python -m tests.benchmarks.study [--alone N]

12 cells of 5 steps: first by the grid with one worker, and with one per core; then N of them (default 12), started one
after the other. All give the same losses, which is checked.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from qvtune.report.metrics import read_metrics
from qvtune.study.cell import read_cells
from tests.support.lab import Lab, make_lab
from tests.support.processes import run_command

FACTORS = {"projections": ["qv", "qkv", "v"], "ratio": [1, 4], "seed": [0, 1]}
NUM_CELLS = 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", type=int, default=NUM_CELLS, help="cells that are started one by one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qvtune-study-"))
    try:
        lab = make_lab(folder)
        recipe = lab.config("unused", data__eval=str(folder / "eval.jsonl"))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        (folder / "grid.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "factors": FACTORS}))
        out = Console(highlight=False)
        out.print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
        one = _grid(lab, "grid-one", ["--workers", "1"])
        default = _grid(lab, "grid", [])
        alone = _alone(lab, folder / "grid", options.alone)
        for text, seconds in (("grid, one worker", one), ("grid, default", default), ("one command per cell", alone)):
            out.print(f"{text}: {3600 / seconds:.0f} cells an hour ({seconds:.1f} s a cell), {alone / seconds:.1f} x")
    finally:
        shutil.rmtree(folder)


def _grid(lab: Lab, name: str, arguments: Sequence[str]) -> float:
    """Seconds per cell."""
    command = [sys.executable, "launch/study.py", "grid", str(lab.folder / "grid.yaml"), *arguments]
    seconds = _run(lab, name, [*command, f"run_dir={lab.folder / name}"])
    assert len(read_cells(lab.folder / name)) == NUM_CELLS
    return seconds / NUM_CELLS


def _alone(lab: Lab, study: Path, number: int) -> float:
    """Seconds per cell, of the first ``number``."""
    seconds = 0.0
    for cell in read_cells(study)[:number]:
        run_dir = lab.folder / "alone" / cell.name
        command = ["deepspeed", "--num_gpus", "1", "launch/train.py", "--config", str(lab.folder / "recipe.yaml")]
        overrides = [one for one in cell.overrides if not one.startswith("run_dir=")]
        seconds += _run(lab, f"alone-{cell.name}", [*command, *overrides, f"run_dir={run_dir}"])
        found, expected = (
            [(one["step"], one["loss"]) for one in read_metrics(path, "step")]
            for path in (run_dir, study / "cells" / cell.name)
        )
        assert found == expected, cell.name
    return seconds / number


def _run(lab: Lab, name: str, command: Sequence[str]) -> float:
    """Seconds of a command that succeeds."""
    started = time.monotonic()
    ended = run_command(command, lab.folder / "outputs" / name, timeout=3600, **lab.environment)
    assert ended.code == 0, ended.output
    return time.monotonic() - started


if __name__ == "__main__":
    main()
