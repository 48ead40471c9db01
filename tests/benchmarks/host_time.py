"""Host time of a layer under ZeRO-3 against the plain model: python -m tests.benchmarks.host_time [--ranks 8 32].

It is what a GPU waits for where the host is slower: Python, DeepSpeed's hooks, and the start of each operation. One
process is rank 0 of a process group that moves nothing; the model is so small that computing takes little of the time.
The configuration is a file of ds_configs/, resolved as for a run. CPU time per layer is the difference between a deeper
and a shallower model, so embedding, head and loss have no part in it.
Exits with 1 if a layer takes more than 1.25 times the plain one's time.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qvtune.config.schema import RunConfig
from qvtune.distributed.command import before_imports
from qvtune.distributed.fake_ranks import fake_ranks

ALLOWED = 1.25
DTYPE, DEPTHS = torch.bfloat16, (2, 8)
REPEATS, MICRO_BATCHES = 40, 3
MicroBatch = Callable[[], None]


def _run(*arguments: Any, **train: Any) -> RunConfig:
    """With adapters so small that their factors stay on every rank, as those of a large model do."""
    from tests.support.fake_engine import run_of

    run = run_of(*arguments, **train)
    return run.model_copy(update={"adapter": run.adapter.model_copy(update={"rank": 4})})


def plain(num_layers: int, *, checkpointing: bool) -> MicroBatch:
    """Forward and backward of the whole model without DeepSpeed."""
    from tests.support.fake_engine import small_batch, whole_objective

    objective = whole_objective(_run(1, activation_checkpointing=checkpointing), num_layers, DTYPE)
    return lambda: objective(small_batch()).backward()


def sharded(num_layers: int, num_ranks: int, deepspeed: str, *, checkpointing: bool) -> MicroBatch:
    """The same under DeepSpeed."""
    from tests.support.fake_engine import small_batch, start_engine

    run = _run(num_ranks, deepspeed, activation_checkpointing=checkpointing)
    engine = start_engine(run, num_layers, num_ranks, DTYPE)

    def micro_batch() -> None:
        engine.backward(engine(small_batch()))

    return micro_batch


def milliseconds(micro_batches: dict[str, MicroBatch]) -> dict[str, float]:
    """Smallest CPU time of each, taken in turns: other processes only add to it."""
    found: dict[str, list[float]] = {name: [] for name in micro_batches}
    for repeat in range(REPEATS + 1):
        for name, micro_batch in micro_batches.items():
            started = time.process_time()
            for _ in range(MICRO_BATCHES):
                micro_batch()
            if repeat:  # before, DeepSpeed records the order of the modules
                found[name].append((time.process_time() - started) / MICRO_BATCHES * 1e3)
    return {name: min(times) for name, times in found.items()}


def per_layer(num_ranks: int, deepspeed: str, *, checkpointing: bool) -> tuple[float, float]:
    """Milliseconds of a layer: plain, and under DeepSpeed."""
    few, many = DEPTHS
    with fake_ranks(num_ranks):
        times = milliseconds(
            {f"plain {depth}": plain(depth, checkpointing=checkpointing) for depth in DEPTHS}
            | {f"ours {depth}": sharded(depth, num_ranks, deepspeed, checkpointing=checkpointing) for depth in DEPTHS}
        )
    one, other = ((times[f"{kind} {many}"] - times[f"{kind} {few}"]) / (many - few) for kind in ("plain", "ours"))
    return one, other


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--deepspeed", default="zero3.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    before_imports()
    torch.set_num_threads(1)
    table = Table("ranks", "checkpointing", "plain, ms a layer", options.deepspeed, "ratio")
    worst = 0.0
    for num_ranks in options.ranks:
        for checkpointing in (True, False):
            one, other = per_layer(num_ranks, options.deepspeed, checkpointing=checkpointing)
            worst = max(worst, other / one)
            table.add_row(str(num_ranks), str(checkpointing), f"{one:.2f}", f"{other:.2f}", f"{other / one:.2f}")
    Console(width=120).print(table)
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
