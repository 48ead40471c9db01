"""A chunk: records of a source that become one file of documents, in whatever process."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol, Self

from qvtune.config.data import LossOn
from qvtune.data.documents import DocumentWriter, file_name, read_counts
from qvtune.data.formats import Record, RowParser
from qvtune.data.rows import BadRowError, BadRows, PlainTextRow, Row
from qvtune.data.tokenize import Document
from qvtune.data.workers import Poll
from qvtune.storage.atomic import atomic_file

FIRST_CHUNK_ROWS, MAX_CHUNK_ROWS = 256, 4096  # small ones at first, so that a small source has some for every process
CHUNKS_OF_A_SIZE = 64
MAX_CHUNK_BYTES = 4 * 2**20  # of records: those of a chunk are in memory together
ROWS_PER_CALL = 64  # of the tokenizer


class RowTokenizer(Protocol):
    """What makes tokens and labels of a row: a task.

    ``cache_key`` is part of the cache's key, and ``data.max_length`` is where the task ``truncates``.
    """

    cache_key: str
    truncates: bool

    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: LossOn, max_length: int
    ) -> list[list[Document] | BadRowError]:
        """The documents of each row, or why it cannot be used; see ``qvtune.data.tokenize.tokenize_rows``."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records. ``tokenize`` false: they are only read, to find all that are bad."""

    number: int
    records: Sequence[Record]
    tokenize: bool = True


@dataclass
class Found:
    """What a chunk had.

    ``unreadable`` and ``refused``: rows that are bad before the tokenizer has seen them, and after. ``num_divided``:
    rows that became several documents.
    """

    number: int
    unreadable: BadRows
    refused: BadRows
    num_rows: int = 0
    num_documents: int = 0
    num_divided: int = 0

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "unreadable": vars(self.unreadable), "refused": vars(self.refused)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse."""
        bad = {name: BadRows(**values[name]) for name in ("unreadable", "refused")}
        for one in bad.values():
            one.kinds = Counter(one.kinds)
        return cls(**(values | bad))


def chunks(records: Iterable[Record]) -> Iterator[Chunk]:
    """All records in order. How they are divided depends on them alone, so that every start divides them alike."""
    numbers, found, size = count(), [], 0
    number = next(numbers)
    for record in records:
        found.append(record)
        size += len(record.value if isinstance(record.value, bytes) else repr(record.value))
        if len(found) == _max_rows(number) or size >= MAX_CHUNK_BYTES:
            yield Chunk(number, found)
            number, found, size = next(numbers), [], 0
    if found:
        yield Chunk(number, found)


def _max_rows(number: int) -> int:
    return min(FIRST_CHUNK_ROWS << number // CHUNKS_OF_A_SIZE, MAX_CHUNK_ROWS)


@dataclass(frozen=True)
class ChunkTokenizer:
    """Tokenizes chunks of one source into files of ``folder``."""

    folder: Path
    name: str  # of the source, in messages
    parser: RowParser
    task: RowTokenizer
    tokenizer: Any
    loss_on: LossOn
    max_length: int

    def __call__(self, chunk: Chunk, poll: Poll) -> Found:
        """Write the chunk's file, which is complete or not there. Raises UserError as ``task.tokenize`` does."""
        found = Found(chunk.number, BadRows(self.name, "skip"), BadRows(self.name, "skip"))
        rows, writer = self._rows(chunk, found, poll), DocumentWriter()
        while part := list(islice(rows, ROWS_PER_CALL)):
            poll()
            if chunk.tokenize:
                writer.add(self._documents(part, found))
        found.num_documents = len(writer)
        if chunk.tokenize:
            with atomic_file(self.folder / file_name(chunk.number)) as private:
                writer.write(private, found.as_json())
        return found

    def finished(self, chunk: Chunk) -> Found | None:
        """What was found when the chunk's file was written; None if it is not there."""
        path = self.folder / file_name(chunk.number)
        return Found.from_json(read_counts(path)) if path.exists() else None

    def _rows(self, chunk: Chunk, found: Found, poll: Poll) -> Iterator[Row]:
        for record in chunk.records:
            poll()
            try:
                row = self.parser.parse(record)
            except BadRowError as reason:
                found.unreadable.add(record.place, reason)
            else:
                found.num_rows += 1
                yield row

    def _documents(self, rows: Sequence[Row], found: Found) -> Iterator[tuple[Document, bool]]:
        """Each with whether it is a text, which may be divided anywhere."""
        tokenized = self.task.tokenize(rows, self.tokenizer, self.loss_on, self.max_length)
        for row, documents in zip(rows, tokenized, strict=True):
            if isinstance(documents, BadRowError):
                found.refused.add(row.place, documents)
                continue
            found.num_divided += len(documents) > 1
            yield from ((document, isinstance(row, PlainTextRow)) for document in documents)
