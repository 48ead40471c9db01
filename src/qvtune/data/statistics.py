"""A data set in numbers: for people, and to notice that a run is resumed on other rows."""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtune.data import IGNORE_INDEX

NUM_LONGEST = 5


@dataclass(frozen=True)
class RowBlock:
    """Packed rows from ``first_row`` on, one after another: ``input_ids`` and ``labels`` of [tokens].

    ``document_lengths`` of [documents] are those of all rows; ``num_documents`` of [rows] says how many each row has.
    """

    first_row: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    document_lengths: NDArray[np.int32]
    num_documents: NDArray[np.int32]


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: how many documents have ``min_tokens`` to ``max_tokens`` tokens, both included."""

    min_tokens: int
    max_tokens: int
    documents: int


@dataclass(frozen=True)
class LongDocument:
    """A document by its place: the packed row, and its index in that row, both from 0."""

    row: int
    document: int
    tokens: int
    label_tokens: int


@dataclass(frozen=True)
class Statistics:
    """Numbers of packed rows.

    Attributes:
        rows, documents, tokens, label_tokens: how many. Label tokens are the ones that have a loss.
        label_share: label_tokens / tokens.
        packing_density: tokens / (rows * max_length); the rest is padding where all rows have the same length.
        source_rows: good rows of the source.
        split: conversations that are several documents, because the chat template changes earlier turns.
        truncated: documents that were truncated to max_length.
        long_split: documents that were divided, because they were longer than max_length.
        long_dropped: documents that were left out, because they were longer than max_length.
        dropped: documents that were left out because they have no label within max_length.
        skipped: bad rows of the source that were left out.
        skipped_by_reason: the same by the kind of reason.
        document_lengths: histogram of the documents' tokens; the bins' borders are powers of 2.
        label_lengths: the same of their label tokens.
        longest: at most NUM_LONGEST documents, the longest first.
        crc32: checksum of all tokens, labels and document lengths in the order of the rows, in hexadecimal.
    """

    rows: int
    documents: int
    tokens: int
    label_tokens: int
    label_share: float
    packing_density: float
    source_rows: int
    split: int
    truncated: int
    long_split: int
    long_dropped: int
    dropped: int
    skipped: int
    skipped_by_reason: dict[str, int]
    document_lengths: list[Bin]
    label_lengths: list[Bin]
    longest: list[LongDocument]
    crc32: str


def statistics(blocks: Iterable[RowBlock], max_length: int, counts: Mapping[str, Any]) -> Statistics:
    """Count everything in one pass, in bounded memory. At least one row; none has more than ``max_length`` tokens.

    ``counts`` are the fields, from ``source_rows`` to ``skipped_by_reason``, that packed rows do not show.
    """
    lengths, label_lengths = np.zeros((2, max_length + 1), np.int64)
    longest: list[LongDocument] = []
    rows = checksum = 0
    for block in blocks:
        num_labels = _label_tokens(block)
        lengths += np.bincount(block.document_lengths, minlength=max_length + 1)
        label_lengths += np.bincount(num_labels, minlength=max_length + 1)
        longest = sorted([*longest, *_longest(block, num_labels)], key=lambda one: -one.tokens)[:NUM_LONGEST]
        rows += len(block.num_documents)
        for values in (block.input_ids, block.labels, block.document_lengths):
            checksum = zlib.crc32(values.data, checksum)
    sizes = np.arange(max_length + 1)
    tokens, label_tokens = int(lengths @ sizes), int(label_lengths @ sizes)
    return Statistics(
        rows=rows,
        documents=int(lengths.sum()),
        tokens=tokens,
        label_tokens=label_tokens,
        label_share=label_tokens / tokens,
        packing_density=tokens / (rows * max_length),
        **counts,
        document_lengths=_bins(lengths),
        label_lengths=_bins(label_lengths),
        longest=longest,
        crc32=f"{checksum:08x}",
    )


def _label_tokens(block: RowBlock) -> NDArray[np.int64]:
    """Of each document of the block."""
    starts = np.cumsum(block.document_lengths) - block.document_lengths
    counts: NDArray[np.int64] = np.add.reduceat(block.labels != IGNORE_INDEX, starts, dtype=np.int64)
    return counts


def _longest(block: RowBlock, num_labels: NDArray[np.int64]) -> list[LongDocument]:
    """Of one block; documents of one length in their order."""
    first_documents = np.cumsum(block.num_documents) - block.num_documents  # of each row
    found = []
    for index in np.argsort(-block.document_lengths, kind="stable")[:NUM_LONGEST]:
        row = int(np.searchsorted(first_documents, index, side="right")) - 1
        document = int(index - first_documents[row])
        size = int(block.document_lengths[index])
        found.append(LongDocument(block.first_row + row, document, size, int(num_labels[index])))
    return found


def _bins(counts: NDArray[np.int64]) -> list[Bin]:
    """``counts[n]``: documents with n tokens. From the first bin with a document to the last."""
    max_tokens = len(counts) - 1
    borders = [0, *(2**power for power in range(max_tokens.bit_length()))]  # each bin's smallest number of tokens
    documents = np.add.reduceat(counts, borders)
    largest = [*(border - 1 for border in borders[1:]), max_tokens]
    filled = np.flatnonzero(documents)
    kept = slice(filled[0], filled[-1] + 1)
    return [Bin(*values) for values in zip(borders[kept], largest[kept], documents[kept].tolist(), strict=True)]


def combined(sources: Sequence[Mapping[str, Any]], max_length: int) -> dict[str, Any]:
    """The statistics of several sources together, one source's rows after another's, all as plain JSON values.

    ``crc32`` is a checksum of those of the sources.
    """
    if len(sources) == 1:
        return dict(sources[0])
    found: dict[str, Any] = {
        name: sum(one[name] for one in sources) for name in sources[0] if isinstance(sources[0][name], int)
    }
    first_rows = np.cumsum([0, *(one["rows"] for one in sources)]).tolist()
    longest = [
        {**document, "row": first_row + document["row"]}
        for first_row, one in zip(first_rows, sources, strict=False)
        for document in one["longest"]
    ]
    reasons = sum((Counter(one["skipped_by_reason"]) for one in sources), Counter())
    return found | {
        "label_share": found["label_tokens"] / found["tokens"],
        "packing_density": found["tokens"] / (found["rows"] * max_length),
        "skipped_by_reason": dict(reasons),
        "document_lengths": _added([one["document_lengths"] for one in sources]),
        "label_lengths": _added([one["label_lengths"] for one in sources]),
        "longest": sorted(longest, key=lambda document: -document["tokens"])[:NUM_LONGEST],
        "crc32": f"{zlib.crc32(' '.join(one['crc32'] for one in sources).encode()):08x}",
    }


def _added(histograms: Sequence[Sequence[Mapping[str, int]]]) -> list[dict[str, int]]:
    """Bins of equal borders; from the first with a document to the last."""
    counts: Counter[tuple[int, int]] = Counter()
    for histogram in histograms:
        for one in histogram:
            counts[one["min_tokens"], one["max_tokens"]] += one["documents"]
    return [
        {"min_tokens": smallest, "max_tokens": largest, "documents": counts[smallest, largest]}
        for smallest, largest in sorted(counts)
    ]
