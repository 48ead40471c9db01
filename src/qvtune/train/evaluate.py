"""Evaluation: the task's metrics over all rows, on all ranks."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qvtune.data.batch import Batch, empty_batch
from qvtune.data.dataset import TokenRows
from qvtune.distributed import process_group
from qvtune.tasks.task import Task


@torch.no_grad()
def evaluate(
    engine: Any,
    task: Task,
    rows: TokenRows,
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


def _own_batches(
    task: Task, rows: TokenRows, micro_batch_size: int, pad_token_id: int, before_batch: Callable[[], None]
) -> Iterator[Batch]:
    """This rank's batches, equally many on every rank, as ZeRO-3's gathers need: without rows left, an empty one."""
    for start in range(0, len(rows), micro_batch_size * process_group.world_size()):
        before_batch()
        first = start + process_group.rank() * micro_batch_size
        own = [rows[index] for index in range(first, min(first + micro_batch_size, len(rows)))]
        yield task.collate(own, pad_token_id) if own else empty_batch(pad_token_id)
