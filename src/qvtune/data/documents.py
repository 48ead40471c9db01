"""Tokenized documents on disk: Arrow files that are written once, and read by every process where it needs them."""

import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_TOKEN_BYTES = 4
_ALL = 2**62  # tokens
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
        return [Lists(_view(chunk.values), _view(chunk.offsets)) for chunk in self.table.column(name).chunks]

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers, a copy."""
        return np.concatenate([_view(chunk) for chunk in self.table.column(name).chunks])

    def position(self, values: NDArray[Any]) -> int:
        """Where a view of the file begins in it, in bytes."""
        start: int = np.frombuffer(self._map, np.uint8).ctypes.data
        return values.ctypes.data - start

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


class DocumentWriter:
    """Collects the documents of one file; in arrays, of which a token takes a tenth of what it takes in a list."""

    def __init__(self) -> None:
        self._lists: list[list[NDArray[np.int32]]] = [[] for _ in _LISTS]  # of each call of ``add``, one after another
        self._lengths: list[list[int]] = [[] for _ in _LISTS]
        self._is_text: list[bool] = []
        self._truncated: list[bool] = []

    def __len__(self) -> int:
        return len(self._is_text)

    def add(self, documents: Iterable[tuple[Document, bool]]) -> None:
        """Documents, each with whether it ``is_text``."""
        added = list(documents)
        for name, parts, lengths in zip(("ids", "labels", "token_type_ids"), self._lists, self._lengths, strict=True):
            values = [getattr(document, name) for document, _ in added]
            lengths += map(len, values)
            parts.append(np.fromiter(chain.from_iterable(values), np.int32, sum(map(len, values))))
        self._is_text += [is_text for _, is_text in added]
        self._truncated += [document.truncated for document, _ in added]

    def write(self, path: Path, counts: Counts) -> None:
        """Write the file. ``counts``: what there is to count of the rows, for ``read_counts``."""
        values = [np.concatenate([np.empty(0, np.int32), *parts]) for parts in self._lists]
        offsets = [np.cumsum([0, *lengths]) for lengths in self._lengths]
        num_labels_before = np.concatenate(([0], np.cumsum(values[1] != IGNORE_INDEX)))
        columns = [
            *map(list_column, values, offsets),
            column(np.diff(num_labels_before[offsets[1]]).astype(np.int32)),
            column(np.array(self._is_text, np.uint8)),
            column(np.array(self._truncated, np.uint8)),
        ]
        with pa.ipc.new_stream(str(path), _COLUMNS.with_metadata({_COUNTS: json.dumps(counts)})) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_COLUMNS))


def _view(array: pa.Array) -> NDArray[Any]:
    """The same numbers in NumPy, not copied. ``array.to_numpy`` would import pandas."""
    return np.frombuffer(array.buffers()[1], str(array.type), len(array), array.offset * array.type.byte_width)


def column(values: NDArray[Any]) -> pa.Array:
    """The same values in Arrow, not copied. ``pa.array`` would import pandas."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def list_column(values: NDArray[Any], offsets: NDArray[np.integer[Any]]) -> pa.Array:
    """Lists, of which the i-th is values[offsets[i]:offsets[i + 1]]."""
    inner = column(values)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32))]
    return pa.Array.from_buffers(pa.list_(inner.type), len(offsets) - 1, buffers, children=[inner])


def read_counts(path: Path) -> Counts:
    """What ``DocumentWriter.write`` was given."""
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
        self._open: Callable[[int], _File] = lru_cache(_OPEN_FILES)(lambda number: _File(folder / file_name(number)))

    def __len__(self) -> int:
        return self._ends[-1]

    def tables(self) -> Iterator[DocumentTable]:
        """One file after another."""
        for number in range(len(self._ends)):
            mapped = MappedTable(self._folder / file_name(number))
            numbers = map(mapped.numbers, ("num_label_tokens", "is_text", "truncated"))
            yield DocumentTable(np.diff(mapped.lists("input_ids")[0].offsets), *numbers)

    def labels(self, document: int) -> NDArray[np.int32]:
        """Of one document."""
        return self.gather([document], [0], [_ALL])[1]

    def gather(
        self, documents: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, labels and types of parts of documents, one part after another.

        Part i is ``lengths[i]`` tokens, or as many as there are, from token ``starts[i]`` on.
        """
        places = list(map(self._place, documents))
        found = []
        for which in range(len(_LISTS)):
            of_files = zip(places, starts, lengths, strict=True)
            found.append(_joined([file.part(which, index, start, length) for (file, index), start, length in of_files]))
        ids, labels, types = found
        return ids, labels, types

    def _place(self, document: int) -> tuple["_File", int]:
        number = bisect_right(self._ends, document)
        return self._open(number), document - (self._ends[number - 1] if number else 0)


class _File:
    """An open file. Tokens are read, not mapped: a mapped page counts as memory of every process that looks at it."""

    def __init__(self, path: Path) -> None:
        mapped = MappedTable(path)
        lists = [mapped.lists(name)[0] for name in _LISTS]
        self._positions = [mapped.position(one.values) for one in lists]
        self._offsets = [one.offsets.copy() for one in lists]
        self._file = path.open("rb", buffering=0)

    def part(self, which: int, index: int, start: int, length: int) -> "_Part":
        """Of document ``index`` in list ``which`` of _LISTS."""
        first, end = map(int, self._offsets[which][index : index + 2])
        first = min(first + start, end)
        return self._file.fileno(), self._positions[which] + first * _TOKEN_BYTES, min(length, end - first)


_Part = tuple[int, int, int]  # file descriptor, position in the file, number of tokens


def _joined(parts: Sequence[_Part]) -> NDArray[np.int32]:
    values = np.empty(sum(count for _, _, count in parts), np.int32)
    memory, done = memoryview(values.data).cast("B"), 0
    for descriptor, position, count in parts:
        end = done + count * _TOKEN_BYTES
        while done < end:
            num_read = os.preadv(descriptor, [memory[done:end]], position)
            if not num_read:
                raise OSError(f"a file of the token cache has been cut off after it was written (position {position})")
            done, position = done + num_read, position + num_read
    return values
