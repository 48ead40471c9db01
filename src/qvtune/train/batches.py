"""The micro-batches of a run, each prepared while the one before it is computed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from qvtune.config.schema import RunConfig
from qvtune.data.batch import Batch
from qvtune.distributed import process_group
from qvtune.train.prepare import Run

Item = TypeVar("Item")
Value = TypeVar("Value")


def micro_batches(run: Run, config: RunConfig) -> Iterator[Batch]:
    """This rank's micro-batches from the step after the last complete one on, on its device; there is no end.

    The next one is read, padded and pinned by another thread meanwhile, and its copy to a GPU does not wait.
    """
    device, step = run.engine.device, run.state.step

    def prepare(row_ids: list[int]) -> Batch:
        batch = run.plan.task.collate([run.plan.rows[row] for row in row_ids], run.plan.pad_token_id)
        return batch.pin_memory() if device.type == "cuda" else batch

    for batch in one_ahead(prepare, own_row_ids(run, config, step)):
        yield batch.to(device)


def own_row_ids(run: Run, config: RunConfig, step: int) -> Iterator[list[int]]:
    """Of each micro-batch: ranks take turns in the global order of rows."""
    size, world_size = config.train.micro_batch_size, process_group.world_size()
    for index in count(step):
        row_ids = run.plan.order.of_step(index, config.train.global_batch_size).tolist()
        for start in range(process_group.rank() * size, len(row_ids), world_size * size):
            yield row_ids[start : start + size]


def one_ahead(prepare: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """What ``prepare`` makes of each item, in order; another thread works on the next one while one is used.

    An exception of ``prepare`` is raised when its value is due.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next batch") as worker:
        current: Future[Value] | None = None
        for item in items:
            following = worker.submit(prepare, item)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
