"""The documents of a packed batch, one per row."""

from itertools import pairwise

import numpy as np
import torch

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, round_up, with_segments


def separate(batch: Batch) -> Batch:
    """Return the same documents, one per row: packing must not change their loss.

    Documents without a label, such as padding, are dropped: they have no loss. Padded with token 0.
    """
    labels = batch.labels.flatten()
    spans = [
        (start, end) for start, end in pairwise(batch.cu_seqlens.tolist()) if (labels[start:end] != IGNORE_INDEX).any()
    ]
    assert spans, "a batch without labels has nothing to compare"
    length = round_up(max(end - start for start, end in spans))
    segments = [size for start, end in spans for size in (end - start, length - (end - start)) if size]

    def cut(values: torch.Tensor, padding: int) -> np.ndarray:
        rows = np.full((len(spans), length), padding, dtype=np.int64)
        for row, (start, end) in zip(rows, spans, strict=True):
            row[: end - start] = values.flatten()[start:end].cpu().numpy()
        return rows

    token_type_ids = None if batch.token_type_ids is None else cut(batch.token_type_ids, 0)
    apart = with_segments(cut(batch.input_ids, 0), cut(batch.labels, IGNORE_INDEX), segments, token_type_ids)
    return apart.to(batch.input_ids.device)
