"""Check at start-up that the documents of a row do not see each other, with the attention that the run uses.

Every second document gets other tokens. The hidden states of the documents between must be what they were before: any
path from one document to its neighbour changes them. A few tokens show it, whatever the data and its labels are.
"""

import math
from typing import Any

import numpy as np
import torch

from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow
from qvtune.distributed import process_group
from qvtune.model.varlen import VARLEN
from qvtune.tasks.task import Task

_LENGTH = 64  # tokens of each of the two rows, at most
_EXACT = ("sdpa", VARLEN)  # equal in every bit: what is hidden enters no sum, or enters it as 0
# Elsewhere: relative to the largest hidden state. A token of another document changes them by far more.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@torch.no_grad()
def check_isolation(
    engine: Any, task: Task, row: PackedRow, pad_token_id: int, attention: str, dtype: torch.dtype
) -> str:
    """Compare hidden states before and after a change in other documents. Returns a line for the log; collective.

    The documents are made of the tokens of ``row``, two rows of at most 64 tokens; ``attention`` is the name of the
    implementation in transformers.

    Raises RuntimeError where the states differ, because the attention ignores document borders, where the change itself
    is not seen, and where states are not finite.
    """
    leaked, seen = _largest_differences(engine, task, _rows_of_documents(row), pad_token_id)
    largest, largest_seen, unseen = process_group.max_over_ranks(leaked, seen, seen == 0)
    allowed = 0.0 if attention in _EXACT else _TOLERANCE[dtype]
    if not math.isfinite(largest + largest_seen):
        raise RuntimeError("the hidden states are not finite before any training: look at the base")
    if unseen:
        raise RuntimeError("other tokens give the same hidden states: the base has no use of its input")
    if largest > allowed:
        raise RuntimeError(
            f"a document with other tokens changes the hidden states of its neighbours by {largest:.2e} of the largest "
            f"(allowed: {allowed:.0e}): the attention lets documents attend to each other. Set data.packing: false or "
            "another model.attention, and please report the versions in environment.json."
        )
    equal = "are equal in every bit" if largest == 0 else f"differ by {largest:.1e} of the largest"
    return f"packing: hidden states of a document {equal} when its neighbours have other tokens"


def _rows_of_documents(row: PackedRow) -> list[PackedRow]:
    """Two rows of three and of two documents, cut anew out of the tokens of ``row``, repeated where it is short."""
    length = min(_LENGTH, len(row.input_ids))
    tokens = np.resize(row.input_ids, 2 * length)
    types = np.zeros(length if len(row.token_type_ids) else 0, row.token_type_ids.dtype)
    first, third = length // 5, length // 3
    lengths = (first, length - first - third, third), (length - third, third)
    return [
        PackedRow(
            tokens[index * length : (index + 1) * length],
            np.full(length, IGNORE_INDEX, np.int32),
            np.array([size for size in sizes if size], np.int32),
            types,
        )
        for index, sizes in enumerate(lengths)
    ]


def _largest_differences(engine: Any, task: Task, rows: list[PackedRow], pad_token_id: int) -> tuple[float, float]:
    """Of hidden states where tokens stayed, and where they changed, relative to the largest state; NaN is infinite."""
    engine.eval()
    before_BTD = _hidden_states(engine, task, rows, pad_token_id)
    leaked = seen = 0.0
    for parity in (0, 1):  # so that every border has a document that changes on one side, and none on the other
        changed = [_with_other_tokens(one, parity) for one in rows]
        after_BTD = _hidden_states(engine, task, changed, pad_token_id)
        largest = torch.maximum(before_BTD.abs(), after_BTD.abs()).max().clamp_min(torch.finfo(torch.float32).tiny)
        difference_BT = ((after_BTD - before_BTD).abs().amax(dim=-1) / largest).nan_to_num(nan=math.inf)
        is_changed_BT = torch.from_numpy(_changed_tokens(rows, changed, before_BTD.shape[1])).to(before_BTD.device)
        leaked = max(leaked, difference_BT[~is_changed_BT].max().item())
        seen = max(seen, difference_BT[is_changed_BT].max().item())
    engine.train()
    return leaked, seen


def _hidden_states(engine: Any, task: Task, rows: list[PackedRow], pad_token_id: int) -> torch.Tensor:
    hidden_BTD: torch.Tensor = engine(task.collate(rows, pad_token_id).to(engine.device), return_hidden_states=True)
    return hidden_BTD.float()


def _with_other_tokens(row: PackedRow, parity: int) -> PackedRow:
    """Each token of the first, third, ... document (``parity`` 0), or of the others, replaced by another one."""
    document = np.repeat(np.arange(len(row.document_lengths)), row.document_lengths)
    other = np.where(row.input_ids == 0, 1, 0).astype(row.input_ids.dtype)
    tokens = np.where(document % 2 == parity, other, row.input_ids)
    return PackedRow(tokens, row.labels, row.document_lengths, row.token_type_ids)


def _changed_tokens(rows: list[PackedRow], changed: list[PackedRow], length: int) -> np.ndarray:
    """[B, T] bool; the padding counts as a document that was not changed."""
    found = np.zeros((len(rows), length), bool)
    for index, (one, other) in enumerate(zip(rows, changed, strict=True)):
        found[index, : len(one.input_ids)] = one.input_ids != other.input_ids
    return found
