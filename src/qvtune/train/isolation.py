"""Check at start-up that packed documents do not attend to each other, with the attention that the run uses."""

import math
from typing import Any

import torch

from qvtune.data.batch import Batch, separate
from qvtune.distributed import process_group

# Mean nats per label token. Attention across documents changes the loss by 1e-2 or more, rounding by far less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@torch.no_grad()
def check_isolation(engine: Any, batch: Batch, dtype: torch.dtype) -> str:
    """Run a packed batch and its documents one per row; the losses must agree. Returns a line for the log; collective.

    Raises RuntimeError where they differ, because the attention implementation ignores document borders, and where the
    loss is not finite.
    """
    engine.eval()
    packed, apart = engine(batch).item(), engine(separate(batch)).item()
    engine.train()
    if not math.isfinite(process_group.sum_over_ranks(packed)[0]):
        raise RuntimeError("the loss of the first batch is not finite before any training: look at the base")
    difference = process_group.max_over_ranks(abs(packed - apart) / max(1, batch.num_label_tokens))[0]
    if not difference <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"packed and separate documents differ by {difference:.2e} nats per token (allowed: "
            f"{_TOLERANCE[dtype]:.0e}): the attention lets documents attend to each other. Set data.packing: false or "
            "another model.attention, and please report the versions in environment.json."
        )
    return f"packing: losses of packed and of separate documents differ by {difference:.1e} nats per token"
