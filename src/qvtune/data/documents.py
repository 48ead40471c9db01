"""Tokenized documents on disk: Arrow files that are written once and memory-mapped by every process."""

import json
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qvtune.data import IGNORE_INDEX
from qvtune.data.tokenize import Document
from qvtune.storage.files import write_json

SUMMARY_FILE = "documents.json"
_OPEN_FILES = 256  # at most so many files are open, fewer than a process may have
_COUNTS = b"counts"  # in the metadata of a file: numbers of the rows that it was made of
_COLUMNS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("token_type_ids", pa.list_(pa.int32())),
        ("num_label_tokens", pa.int32()),
        ("is_text", pa.uint8()),
        ("truncated", pa.uint8()),
    ]
)
_LISTS = ("input_ids", "labels", "token_type_ids")  # the last one empty where the model has no types
Counts = dict[str, Any]


@dataclass(frozen=True)
class DocumentTable:
    """The documents of one file.

    Attributes:
        lengths, num_label_tokens: of each document, [documents] int32.
        is_text, truncated: whether a document may be divided anywhere, and whether the task has truncated it,
            [documents] 0 or 1.
    """

    lengths: NDArray[np.int32]
    num_label_tokens: NDArray[np.int32]
    is_text: NDArray[np.uint8]
    truncated: NDArray[np.uint8]


class MappedTable:
    """An Arrow file, memory-mapped. Values read from it are views, to be copied before ``release``."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table: pa.Table = pa.ipc.open_stream(pa.py_buffer(self._map)).read_all()

    def lists(self, name: str) -> list["Lists"]:
        """A column of lists, one entry for each record batch."""
        return [Lists(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in self.table.column(name).chunks]

    def release(self) -> None:
        """Take the pages that were read out of this process's memory; they stay in the system's file cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Lists:
    """Lists one after another in ``values``: the i-th is values[offsets[i]:offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def write_documents(path: Path, documents: Sequence[tuple[Document, bool]], counts: Counts) -> None:
    """Write one file of documents, each with whether it ``is_text``, and what there is to count of their rows."""
    lists = [[getattr(document, name) for document, _ in documents] for name in ("ids", "labels", "token_type_ids")]
    offsets = [np.cumsum([0, *map(len, values)]) for values in lists]
    flat = [
        np.fromiter(chain.from_iterable(values), np.int32, ends[-1])
        for values, ends in zip(lists, offsets, strict=True)
    ]
    num_labels_before = np.concatenate(([0], np.cumsum(flat[1] != IGNORE_INDEX)))
    columns = [
        *map(list_column, flat, offsets),
        column(np.diff(num_labels_before[offsets[1]]).astype(np.int32)),
        column(np.array([is_text for _, is_text in documents], np.uint8)),
        column(np.array([document.truncated for document, _ in documents], np.uint8)),
    ]
    with pa.ipc.new_stream(str(path), _COLUMNS.with_metadata({_COUNTS: json.dumps(counts)})) as writer:
        writer.write_batch(pa.record_batch(columns, schema=_COLUMNS))


def column(values: NDArray[Any]) -> pa.Array:
    """The same values in Arrow, not copied. ``pa.array`` would import pandas."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def list_column(values: NDArray[Any], offsets: NDArray[np.integer[Any]]) -> pa.Array:
    """Lists, of which the i-th is values[offsets[i]:offsets[i + 1]]."""
    inner = column(values)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32))]
    return pa.Array.from_buffers(pa.list_(inner.type), len(offsets) - 1, buffers, children=[inner])


def read_counts(path: Path) -> Counts:
    """What ``write_documents`` was given."""
    with pa.OSFile(str(path)) as file:
        counts: Counts = json.loads(pa.ipc.open_stream(file).schema.metadata[_COUNTS])
    return counts


def file_name(number: int) -> str:
    """Of the file with this number."""
    return f"documents-{number:06d}.arrow"


def write_summary(folder: Path, num_documents: Sequence[int], counts: Counts) -> None:
    """How many documents each file has, and what there is to count of all rows."""
    write_json(folder / SUMMARY_FILE, {"num_documents": list(num_documents), "counts": counts})


class Documents:
    """The documents of a source, in the order of its rows. No file is opened before something is read from it.

    Attributes:
        counts: as given to ``write_summary``.
    """

    def __init__(self, folder: Path) -> None:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        self.counts: Counts = summary["counts"]
        self._folder = folder
        self._ends: list[int] = np.cumsum(summary["num_documents"], dtype=np.int64).tolist()  # of each file
        self._open: Callable[[int], _File] = lru_cache(_OPEN_FILES)(self._open_file)

    def __len__(self) -> int:
        return self._ends[-1]

    def tables(self) -> Iterator[DocumentTable]:
        """One file after another."""
        for number in range(len(self._ends)):
            file = self._open_file(number)
            names = ("num_label_tokens", "is_text", "truncated")
            columns = (file.mapped.table.column(name).to_numpy() for name in names)
            yield DocumentTable(np.diff(file.lists[0].offsets), *columns)

    def labels(self, document: int) -> NDArray[np.int32]:
        """Of one document, a copy."""
        return self.gather([document], [0], [None])[1]

    def gather(
        self, documents: Sequence[int], starts: Sequence[int], lengths: Sequence[int | None]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, labels and types of parts of documents, one part after another, copied.

        A part is ``lengths[i]`` tokens (None: all) from ``starts[i]`` on.
        """
        parts: tuple[list[NDArray[np.int32]], ...] = ([], [], [])
        files = set()
        for document, start, length in zip(documents, starts, lengths, strict=True):
            number = bisect_right(self._ends, document)
            file = self._open(number)
            files.add(number)
            index = document - (self._ends[number - 1] if number else 0)
            end = None if length is None else start + length
            for values, found in zip(file.lists, parts, strict=True):
                found.append(values[index][start:end])
        ids, labels, types = map(np.concatenate, parts)
        for number in files:
            self._open(number).mapped.release()
        return ids, labels, types

    def _open_file(self, number: int) -> "_File":
        mapped = MappedTable(self._folder / file_name(number))
        return _File(mapped, tuple(mapped.lists(name)[0] for name in _LISTS))


@dataclass(frozen=True)
class _File:
    mapped: MappedTable
    lists: tuple[Lists, ...]  # as _LISTS
