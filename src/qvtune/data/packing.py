"""Packing: which documents share a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedRow:
    """Documents one after another: ``input_ids`` and ``labels`` of [tokens], ``document_lengths`` of [documents].

    ``labels`` are not shifted. Task causal_lm: labels[t] is input_ids[t] where that token has to be predicted, else
    IGNORE_INDEX; the first token of a document always has IGNORE_INDEX. Task sequence_classification: the first token
    of a document has the document's label, all others IGNORE_INDEX. ``token_type_ids``: of [tokens], or of [0] where
    the model has no types.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    document_lengths: NDArray[np.int32]
    token_type_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put whole documents into rows of at most ``max_length`` tokens; each row lists document indices.

    Best-fit decreasing: from the longest document to the shortest, each goes into the fullest row that still has
    room (of equally full rows the newest). It takes at most 11/9 of the fewest possible rows + 4 (Johnson et al.,
    1974). Deterministic: equal lengths keep their order. O(n log n), with at most ``max_length`` distinct free spaces.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # sorted keys of rows_by_space
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[document]
        assert 0 < length <= max_length, f"document {document} has {length} tokens, a row {max_length}"
        position = bisect_left(spaces, length)
        if position == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[position]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[position]
        rows[row].append(document)
        if space > length:
            _add_row(rows_by_space, spaces, space - length, row)
    return rows


def _add_row(rows_by_space: dict[int, list[int]], spaces: list[int], space: int, row: int) -> None:
    if space not in rows_by_space:
        rows_by_space[space] = []
        insort(spaces, space)
    rows_by_space[space].append(row)
