"""The message for a step whose loss or gradient is not finite: which rows of which rank have led to it."""

from collections.abc import Sequence
from itertools import islice
from typing import NoReturn

import torch

from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.train.batches import own_row_ids
from qvtune.train.data import places_of_row
from qvtune.train.prepare import Run

_PLACES_SHOWN = 10


def raise_not_finite(what: str, value: float, run: Run, config: RunConfig, losses: Sequence[torch.Tensor]) -> NoReturn:
    """Raises RuntimeError, the same on all ranks; collective. ``losses``: of this rank's micro-batches of the step.

    Names the micro-batches whose loss is not finite; all of the step where there is none, only a gradient.
    """
    step = run.state.step
    row_ids = list(islice(own_row_ids(run, config, step), len(losses)))
    finite = [bool(loss.isfinite()) for loss in losses]
    places = [[place for row in ids for place in places_of_row(config, run.plan.rows, row)] for ids in row_ids]
    of_ranks = process_group.all_gather_object(list(zip(finite, places, strict=True)))
    micro_batches = [
        (rank, number, one, where)
        for rank, found in enumerate(of_ranks)
        for number, (one, where) in enumerate(found, start=1)
    ]
    bad = [entry for entry in micro_batches if not entry[2]]
    why = "rows with a loss that is not finite" if bad else "the losses of all rows are finite; the rows of this step"
    lines = [
        f"rank {rank}, micro-batch {number}: {'; '.join(where[:_PLACES_SHOWN])}"
        for rank, number, _, where in bad or micro_batches
    ]
    shown = "\n  ".join(lines[:_PLACES_SHOWN])
    raise RuntimeError(f"step {step + 1}: the {what} is {value}; no checkpoint contains this step; {why}:\n  {shown}")
