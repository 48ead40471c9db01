"""Predicted against tracked memory of real runs on CPU ranks: python -m tests.benchmarks.plan [--ranks 1 2 4 8].

Each rank trains the embedded model for two optimizer steps and counts the bytes of all tensors that are alive; the
largest sum is compared with the plan's. Rows are full, of two documents, and all but two of their tokens have a label:
what the plan takes as the worst.
Exits with 1 if a prediction is off by more than 10 %.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qvtune.config.deepspeed import resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.embedded.model import demo_model
from qvtune.model.quantize import quantize
from qvtune.model.skeleton import read_model_config
from qvtune.plan.memory import costs_of
from qvtune.plan.simulate import Setup
from qvtune.storage.paths import cache_dir
from qvtune.versions import repository
from tests.plan.tracked import tracked
from tests.support.forks import stop_server

TOLERANCE = 0.10
LENGTH = {"float32": 256, "bfloat16": 64}  # tokens; CPUs multiply in bfloat16 twenty times slower


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    num_ranks: int
    stage: str
    dtype: str
    checkpointing: bool

    def config(self, folder: Path) -> dict[str, Any]:
        """The run, in ``folder``."""
        name = "-".join(map(str, vars(self).values()))
        return {
            "run_dir": str(folder / "runs" / name),
            "deepspeed": str(_deepspeed_file(self.stage, self.num_ranks, folder)),
            "model": {"name_or_path": str(folder / "nf4"), "dtype": self.dtype, "attention": "sdpa"},
            "data": {"train": str(folder / f"{self.dtype}.jsonl"), "max_length": LENGTH[self.dtype]},
            "train": {
                "max_steps": 2,
                "global_batch_size": self.num_ranks,
                "activation_checkpointing": self.checkpointing,
            },
        }

    def predicted(self, folder: Path) -> int:
        """Bytes of a rank."""
        run = RunConfig.model_validate(self.config(folder))
        deepspeed_config = resolve_deepspeed(run, self.num_ranks, self.dtype)
        model_config = read_model_config(Path(run.model.name_or_path), run.model)
        setup = Setup(run, model_config, deepspeed_config, getattr(torch, self.dtype), "sdpa")
        return costs_of(setup, self.num_ranks).peak.total()


def _deepspeed_file(stage: str, num_ranks: int, folder: Path) -> Path:
    """The file of ds_configs/; with hpZ half of the ranks are a node, or all of two."""
    file = repository() / "ds_configs" / f"{stage}.json"
    if stage != "zero3_hpz":
        return file
    content = json.loads(file.read_text())
    content["zero_optimization"]["zero_hpz_partition_size"] = 2 if num_ranks == 2 else max(1, num_ranks // 2)
    own = folder / f"zero3_hpz-{num_ranks}.json"
    own.write_text(json.dumps(content))
    return own


def cells(ranks: list[int]) -> Iterator[Cell]:
    """The matrix, those of one number of ranks together."""
    for num_ranks in ranks:
        for stage in ("zero2", "zero3", "zero3_hpz"):
            for dtype in ("float32", "bfloat16"):
                for checkpointing in (False, True):
                    yield Cell(num_ranks, stage, dtype, checkpointing)


def main() -> int:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    ranks = parser.parse_args().ranks
    table = Table("ranks", "stage", "dtype", "checkpointing", "tracked MiB", "predicted MiB", "difference")
    worst, console = 0.0, Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quantize(demo_model(cache_dir()), folder / "nf4")
        for dtype, length in LENGTH.items():
            row = {"prompt": "a", "completion": " word" * (length // 2 - 2)}  # half of a row, with its end
            (folder / f"{dtype}.jsonl").write_text((json.dumps(row) + "\n") * 32)
        for num_ranks in ranks:
            for index, cell in enumerate(cells([num_ranks])):
                # Processes of its own for each: DeepSpeed makes the groups of hpZ once in a process.
                (steps,) = tracked([cell.config(folder)], num_ranks, folder / f"{num_ranks}-{index}")
                found = max(step["peak"] for step in steps)
                predicted = cell.predicted(folder)
                difference = predicted / found - 1
                worst = max(worst, abs(difference))
                mebibytes = [f"{size / 2**20:,.0f}" for size in (found, predicted)]
                row = [*map(str, vars(cell).values()), *mebibytes, f"{difference:+.1%}"]
                table.add_row(*row)
                console.print("  ".join(row))  # it takes an hour: what there is so far
        stop_server()
    console.print(table)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
