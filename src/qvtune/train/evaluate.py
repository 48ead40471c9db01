"""Evaluation: the task's metrics over all rows, on all ranks."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qvtune.data.batch import Batch, empty_batch
from qvtune.data.mixture import Rows
from qvtune.distributed import process_group
from qvtune.tasks.task import Task


@torch.no_grad()
def evaluate(
    engine: Any,
    task: Task,
    rows: Rows,
    micro_batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], float]:
    """The task's metrics over ``rows``, and the seconds it took; collective.

    ``before_batch`` is called equally often on all ranks.
    """
    started = time.monotonic()
    engine.eval()
    metrics = task.evaluate(engine, _own_batches(task, rows, micro_batch_size, pad_token_id, before_batch))
    engine.train()
    return metrics, time.monotonic() - started


def evaluate_sets(
    engine: Any,
    task: Task,
    sets: Mapping[str, Rows],
    micro_batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None],
) -> tuple[dict[str, dict[str, float]], float]:
    """Name of a set -> its metrics, and the seconds that all sets took; as ``evaluate``."""
    found = {
        name: evaluate(engine, task, rows, micro_batch_size, pad_token_id, before_batch) for name, rows in sets.items()
    }
    return {name: metrics for name, (metrics, _) in found.items()}, sum(seconds for _, seconds in found.values())


def as_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of all sets in one line; with the names of the sets where there are several."""
    lines = {
        name: ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()) for name, metrics in found.items()
    }
    return "; ".join(f"{name}: {line}" if len(lines) > 1 else line for name, line in lines.items())


def _own_batches(
    task: Task, rows: Rows, micro_batch_size: int, pad_token_id: int, before_batch: Callable[[], None]
) -> Iterator[Batch]:
    """This rank's batches, equally many on every rank, as ZeRO-3's gathers need: without rows left, an empty one."""
    for start in range(0, len(rows), micro_batch_size * process_group.world_size()):
        before_batch()
        first = start + process_group.rank() * micro_batch_size
        own = [rows[index] for index in range(first, min(first + micro_batch_size, len(rows)))]
        yield task.collate(own, pad_token_id) if own else empty_batch(pad_token_id)
