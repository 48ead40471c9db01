"""Packed rows: which pieces of a source's documents each row consists of, on disk, and the rows themselves."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qvtune.config.data import DataSection, SourceSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.chunk import RowTokenizer
from qvtune.data.dense_packing import pack_dense
from qvtune.data.documents import Documents, MappedTable, column, list_column
from qvtune.data.packing import PackedRow, pack
from qvtune.data.pieces import Pieces, pieces, windows
from qvtune.data.sources.source import open_source
from qvtune.data.statistics import RowBlock, statistics
from qvtune.data.token_cache import tokenized
from qvtune.data.workers import Poll
from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder
from qvtune.storage.files import write_json

PACKING_VERSION = 1  # increment it when the same documents would give other rows or statistics
WINDOW = 2**16  # pieces that are packed together: memory is that of a window, and hardly any row would be fuller
ROWS_FILE, STATISTICS_FILE = "rows.arrow", "statistics.json"
_ROWS_PER_BLOCK = 1000  # the checksum of the statistics depends on it
_LISTS = ("documents", "starts", "lengths")
_COLUMNS = pa.schema(
    [
        ("documents", pa.list_(pa.int64())),
        ("starts", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),
        ("num_label_tokens", pa.int32()),
    ]
)


class TokenRows:
    """Read-only packed rows of one source; only the counts per row are in memory.

    Attributes:
        statistics: ``Statistics`` of the rows, as plain JSON values.
        num_tokens, num_label_tokens: of each row, [rows] int32.
    """

    def __init__(self, documents: Documents, folder: Path) -> None:
        self.statistics: dict[str, Any] = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        self._documents, self._index = documents, RowIndex(folder / ROWS_FILE)
        self.num_tokens, self.num_label_tokens = self._index.num_tokens, self._index.num_label_tokens

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> PackedRow:
        return _read(self._documents, *self._index[int(index)])

    def documents(self, index: int) -> NDArray[np.int64]:
        """The number of each of a row's documents, in the order of the source's rows; a divided document's is there
        once for each piece."""
        return self._index[int(index)][0]

    @property
    def num_documents(self) -> int:
        """How many documents were tokenized, also those of which no row has a part."""
        return len(self._documents)


class RowIndex:
    """Which pieces each row consists of: ``index[row]`` is documents, starts and lengths, each [pieces]."""

    def __init__(self, path: Path) -> None:
        self._mapped = MappedTable(path)
        columns = [self._mapped.lists(name) for name in _LISTS]
        self._windows = list(zip(*columns, strict=True))
        self._ends: list[int] = np.cumsum([len(lists[0]) for lists in self._windows]).tolist()
        self.num_tokens, self.num_label_tokens = map(self._mapped.numbers, ("num_tokens", "num_label_tokens"))

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        window = bisect_right(self._ends, row)
        index = row - (self._ends[window - 1] if window else 0)
        documents, starts, lengths = (lists[index].copy() for lists in self._windows[window])
        self._mapped.release()
        return documents, starts, lengths


def build_token_rows(
    source: SourceSection,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    task: RowTokenizer,
    cache_dir: Path,
    poll: Poll = lambda: None,
) -> TokenRows:
    """Return the packed rows of a source, from ``cache_dir`` if the same rows were tokenized in the same way before.

    With other lengths or another packing nothing is tokenized again.

    Raises UserError for a source, rows or a tokenizer that cannot be used, and whatever ``poll`` raises.
    """
    folder = tokenized(open_source(source), config, tokenizer, task, cache_dir, poll)
    documents = Documents(folder)
    kind = config.packing if isinstance(config.packing, str) else "packed" if config.packing else "single"
    rows = folder / f"rows-v{PACKING_VERSION}-{config.max_length}-{kind}-{config.on_long_row}"
    if not rows.is_dir():
        with atomic_folder(rows, if_taken="keep") as private:
            _write(private, documents, source.path, config, poll)
    return TokenRows(documents, rows)


def _write(folder: Path, documents: Documents, name: str, config: DataSection, poll: Poll) -> None:
    counts: Counter[str] = Counter(truncated=0, dropped=0, long_split=0, long_dropped=0)
    num_rows = 0
    with pa.ipc.new_stream(str(folder / ROWS_FILE), _COLUMNS) as writer:
        for window in windows(pieces(documents, config.max_length, config.on_long_row, counts), WINDOW):
            poll()
            groups = _groups(window.lengths.tolist(), config)
            writer.write_batch(_as_batch(window, groups))
            num_rows += len(groups)
    if not num_rows:
        raise UserError(
            f"no row of {name} has a label within its first data.max_length={config.max_length} tokens. Raise "
            "data.max_length."
        )
    blocks = _blocks(documents, RowIndex(folder / ROWS_FILE), poll)
    found = statistics(blocks, config.max_length, {**documents.counts, **counts})
    write_json(folder / STATISTICS_FILE, asdict(found))


def _groups(lengths: list[int], config: DataSection) -> list[list[int]]:
    """Which pieces share a row."""
    if not config.packing:
        return [[piece] for piece in range(len(lengths))]
    return (pack_dense if config.packing == "dense" else pack)(lengths, config.max_length)


def _as_batch(window: Pieces, groups: Sequence[Sequence[int]]) -> pa.RecordBatch:
    order = np.fromiter(chain.from_iterable(groups), np.int64, len(window))
    ends = np.cumsum([len(group) for group in groups])
    offsets = np.concatenate(([0], ends))
    lists = [list_column(array[order], offsets) for array in (window.documents, window.starts, window.lengths)]
    sums = [
        column(np.add.reduceat(array[order], offsets[:-1], dtype=np.int32))
        for array in (window.lengths, window.num_label_tokens)
    ]
    return pa.record_batch([*lists, *sums], schema=_COLUMNS)


def _blocks(documents: Documents, index: "RowIndex", poll: Poll) -> Iterator[RowBlock]:
    """All rows in order, some at a time."""
    for first in range(0, len(index), _ROWS_PER_BLOCK):
        poll()
        rows = [index[row] for row in range(first, min(first + _ROWS_PER_BLOCK, len(index)))]
        joined = _read(documents, *(np.concatenate(lists) for lists in zip(*rows, strict=True)))
        num_documents = np.array([len(of_row) for of_row, _, _ in rows], np.int32)
        yield RowBlock(first, joined.input_ids, joined.labels, joined.document_lengths, num_documents)


def _read(
    documents: Documents, of: NDArray[np.int64], starts: NDArray[np.int32], lengths: NDArray[np.int32]
) -> PackedRow:
    ids, labels, types = documents.gather(of.tolist(), starts.tolist(), lengths.tolist())
    first_tokens = np.cumsum(lengths) - lengths
    labels[first_tokens[starts > 0]] = IGNORE_INDEX  # a piece from inside a document: nothing is before it
    return PackedRow(ids, labels, lengths, types)
