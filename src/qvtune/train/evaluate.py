"""The evaluation loss."""

import time
from collections.abc import Callable
from typing import Any

import torch

from qvtune.data.batch import collate, empty_batch
from qvtune.data.dataset import TokenRows
from qvtune.distributed import process_group


@torch.no_grad()
def evaluate(
    engine: Any,
    rows: TokenRows,
    micro_batch_size: int,
    pad_token_id: int,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Mean cross entropy over all label tokens of ``rows`` (nats), and the seconds it took; collective.

    Every rank runs the same number of forward passes, as ZeRO-3's gathers need; one that has no rows left runs an
    empty batch. ``between_batches`` is called equally often on all ranks.
    """
    started = time.monotonic()
    engine.eval()
    loss_sum = 0.0
    for start in range(0, len(rows), micro_batch_size * process_group.world_size()):
        between_batches()
        first = start + process_group.rank() * micro_batch_size
        mine = [rows[index] for index in range(first, min(first + micro_batch_size, len(rows)))]
        batch = collate(mine, pad_token_id) if mine else empty_batch(pad_token_id)
        loss_sum += engine(batch.to(engine.device)).item()
    engine.train()
    total = process_group.sum_over_ranks(loss_sum)[0]
    return total / int(rows.num_label_tokens.sum()), time.monotonic() - started
