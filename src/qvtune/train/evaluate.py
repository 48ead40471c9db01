"""Evaluation: the task's metrics over all rows, on all ranks."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, empty_batch
from qvtune.data.mixture import Rows
from qvtune.distributed import process_group
from qvtune.tasks.metrics import Documents
from qvtune.tasks.task import Task


@torch.no_grad()
def evaluate(
    engine: Any,
    task: Task,
    rows: Rows,
    micro_batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
    documents: Documents | None = None,
) -> tuple[dict[str, float], float]:
    """The task's metrics over ``rows``, and the seconds it took; collective.

    ``before_batch`` is called equally often on all ranks. Where ``documents`` is given, it gets what ``Task.evaluate``
    says of each document, in the order of the source however documents are packed.
    """
    started = time.monotonic()
    engine.eval()
    metrics = task.evaluate(engine, _own_batches(task, rows, micro_batch_size, pad_token_id, before_batch), documents)
    engine.train()
    if documents:
        documents.update(_in_source_order(documents, rows))
    return metrics, time.monotonic() - started


def evaluate_sets(
    engine: Any,
    task: Task,
    sets: Mapping[str, Rows],
    micro_batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None],
    documents: Mapping[str, Documents] | None = None,
) -> tuple[dict[str, dict[str, float]], float]:
    """Name of a set -> its metrics, and the seconds that all sets took; as ``evaluate``."""
    found = {
        name: evaluate(
            engine, task, rows, micro_batch_size, pad_token_id, before_batch, documents[name] if documents else None
        )
        for name, rows in sets.items()
    }
    return {name: metrics for name, (metrics, _) in found.items()}, sum(seconds for _, seconds in found.values())


def as_text(found: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of all sets in one line; with the names of the sets where there are several."""
    lines = {
        name: ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()) for name, metrics in found.items()
    }
    return "; ".join(f"{name}: {line}" if len(lines) > 1 else line for name, line in lines.items())


def _in_source_order(documents: Documents, rows: Rows) -> Documents:
    """From the order of packed rows; losses and labels of a divided document's pieces are summed."""
    numbers = np.concatenate([_labelled(rows, index) for index in range(len(rows))])
    _, first, document = np.unique(numbers, return_index=True, return_inverse=True)
    loss, tokens = (np.bincount(document, weights=documents[name]) for name in ("loss", "tokens"))
    others = {name: values[first] for name, values in documents.items()}
    return {**others, "loss": loss, "tokens": tokens.astype(np.int64)}


def _labelled(rows: Rows, index: int) -> NDArray[np.int64]:
    """Numbers of a row's documents that have a label."""
    row = rows[index]
    starts = np.cumsum(row.document_lengths) - row.document_lengths
    return rows.documents(index)[np.logical_or.reduceat(row.labels != IGNORE_INDEX, starts)]


def _own_batches(
    task: Task, rows: Rows, micro_batch_size: int, pad_token_id: int, before_batch: Callable[[], None]
) -> Iterator[Batch]:
    """This rank's batches, equally many on every rank, as ZeRO-3's gathers need: without rows left, an empty one."""
    for start in range(0, len(rows), micro_batch_size * process_group.world_size()):
        before_batch()
        first = start + process_group.rank() * micro_batch_size
        own = [rows[index] for index in range(first, min(first + micro_batch_size, len(rows)))]
        yield task.collate(own, pad_token_id) if own else empty_batch(pad_token_id)
