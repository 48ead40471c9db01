"""Tokenized documents -> pieces of at most ``max_length`` tokens, each of which becomes a document of a packed row."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qvtune.data import IGNORE_INDEX
from qvtune.data.documents import Documents

OnLongRow = Literal["cut", "split", "drop"]


@dataclass(frozen=True)
class Pieces:
    """Consecutive tokens of documents; all arrays have one value a piece.

    Attributes:
        documents: which document, int64.
        starts: its first token in the document, int32.
        lengths, num_label_tokens: how many tokens it has, and how many of them have a label, int32.
    """

    documents: NDArray[np.int64]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    num_label_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, part: Any) -> "Pieces":
        return Pieces(*(array[part] for array in astuple(self)))


def join(parts: Iterable[Pieces]) -> Pieces:
    """One after the other."""
    listed = list(parts)
    return Pieces(*(np.concatenate([getattr(part, field.name) for part in listed]) for field in fields(Pieces)))


def windows(blocks: Iterable[Pieces], size: int) -> Iterator[Pieces]:
    """The same pieces, in blocks of ``size``; only the last is smaller."""
    waiting: list[Pieces] = []
    for block in blocks:
        waiting.append(block)
        while sum(map(len, waiting)) >= size:
            joined = join(waiting)
            yield joined[:size]
            waiting = [joined[size:]]
    if any(map(len, waiting)):
        yield join(waiting)


def pieces(documents: Documents, max_length: int, on_long_row: OnLongRow, counts: Counter[str]) -> Iterator[Pieces]:
    """The pieces of all documents in order, one block for each file; those without a label are left out.

    A document of at most ``max_length`` tokens is one piece. Of a longer one ``cut`` takes the first ``max_length``
    tokens, ``split`` takes as many pieces as it needs, ``drop`` takes none. A text is always split.

    ``counts`` is added to: documents that were ``truncated``, ``long_split`` and ``long_dropped``, and pieces that were
    ``dropped`` since they have no label.
    """
    first = 0
    for table in documents.tables():
        num = len(table.lengths)
        all_whole = Pieces(first + np.arange(num), np.zeros(num, np.int32), table.lengths, table.num_label_tokens)
        is_long = table.lengths > max_length
        parts = [all_whole[~is_long]]
        for index in np.flatnonzero(is_long).tolist():
            how = "split" if table.is_text[index] else on_long_row
            parts.append(_of_long(documents, first + index, max_length, how, counts))
        found = parts[0] if len(parts) == 1 else join(parts)
        found = found[np.argsort(found.documents, kind="stable")]
        has_label = found.num_label_tokens > 0
        counts["truncated"] += int((table.truncated[~is_long] & (table.num_label_tokens[~is_long] > 0)).sum())
        counts["dropped"] += int((~has_label).sum())
        yield found[has_label]
        first += num


def _of_long(documents: Documents, document: int, max_length: int, how: OnLongRow, counts: Counter[str]) -> Pieces:
    if how == "drop":
        counts["long_dropped"] += 1
        return Pieces(*np.empty((4, 0), np.int32))
    has_label = documents.labels(document) != IGNORE_INDEX
    starts = np.arange(0, len(has_label) if how == "split" else 1, max_length)
    lengths = np.minimum(max_length, len(has_label) - starts)
    has_label[starts[1:]] = False  # there is no token before it to predict it from
    num_label_tokens = np.add.reduceat(has_label[: starts[-1] + lengths[-1]], starts, dtype=np.int32)
    counts["long_split" if how == "split" else "truncated"] += bool(num_label_tokens.any())
    return Pieces(np.full(len(starts), document), starts.astype(np.int32), lengths.astype(np.int32), num_label_tokens)
