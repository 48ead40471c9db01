"""Proof at start-up that packed documents do not see each other, with the attention that will be used."""

import math
from typing import Any

import torch

from qvtune.data.batch import Batch, separate
from qvtune.distributed import process_group

# Mean nats a label token. Leaking attention changes the loss by 1e-2 and more; rounding by far less.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@torch.no_grad()
def check_isolation(engine: Any, batch: Batch, dtype: torch.dtype) -> str:
    """Run a packed batch and its documents one a row; the losses must agree. Returns the line for the log; collective.

    Raises RuntimeError where they do not: the attention implementation ignores the document boundaries; and where the
    loss is not finite to begin with.
    """
    engine.eval()
    packed, apart = engine(batch).item(), engine(separate(batch)).item()
    engine.train()
    if not math.isfinite(process_group.sum_over_ranks(packed)[0]):
        raise RuntimeError("the loss of the first batch is not finite, before any training: look at the base")
    difference = process_group.max_over_ranks(abs(packed - apart) / max(1, batch.num_label_tokens))[0]
    if not difference <= _TOLERANCE[dtype]:
        raise RuntimeError(
            f"packed documents and the same documents apart differ by {difference:.2e} nats a token (allowed: "
            f"{_TOLERANCE[dtype]:.0e}): the attention lets documents see each other. Set data.packing: false or "
            "another model.attention, and please report the versions in environment.json."
        )
    return f"packing: loss of packed and of separate documents differs by {difference:.1e} nats a token"
