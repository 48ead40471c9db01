"""Tokenized and packed rows on disk: written once, then memory-mapped by every process."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qvtune.config.data import DataSection, LossOn, SourceSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.chat import FIXED_DATE
from qvtune.data.packing import PackedRow, pack
from qvtune.data.rows import BadRowError, BadRows, PlainTextRow, Row
from qvtune.data.sources.source import Source, open_source, read_rows
from qvtune.data.statistics import RowBlock, statistics
from qvtune.data.tokenize import Document
from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder
from qvtune.storage.files import write_json

CACHE_VERSION = 5  # increment it when the same rows would give other tokens, labels, columns or statistics
ROWS_PER_CALL = 64  # of the tokenizer
ROWS_FILE, STATISTICS_FILE = "rows.arrow", "statistics.json"
LISTS = ("input_ids", "labels", "document_lengths", "token_type_ids")  # the last one empty where a model has none
FEATURES = Features(
    {name: List(Value("int32")) for name in LISTS} | {"num_tokens": Value("int64"), "num_label_tokens": Value("int64")}
)


class TokenRows:
    """Read-only packed rows, memory-mapped from ``folder``; only the counts per row are in memory.

    Attributes:
        statistics: ``Statistics`` of the rows, as plain JSON values.
        num_tokens, num_label_tokens: of each row, [rows] int64.
    """

    def __init__(self, folder: Path) -> None:
        self.statistics: dict[str, Any] = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        self._table = _memory_map(folder / ROWS_FILE)
        self.num_tokens: NDArray[np.int64] = self._table.data.column("num_tokens").to_numpy()
        self.num_label_tokens: NDArray[np.int64] = self._table.data.column("num_label_tokens").to_numpy()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> PackedRow:
        row = self._table[int(index)]
        return PackedRow(*(row.column(name)[0].values.to_numpy() for name in LISTS))


class RowTokenizer(Protocol):
    """What makes tokens and labels of a row: a task. ``cache_key`` is part of the cache's key."""

    cache_key: str

    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: LossOn, max_length: int
    ) -> list[list[Document] | BadRowError]:
        """The documents of each row, or why it cannot be used; see ``qvtune.data.tokenize.tokenize_rows``.

        What is longer than ``max_length`` tokens is cut there, unless the task has done that in a better place.
        """


def build_token_rows(
    source: SourceSection,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    task: RowTokenizer,
    cache_dir: Path,
    between_rows: Callable[[], None] = lambda: None,
) -> TokenRows:
    """Return the rows of a source, from ``cache_dir`` if the same rows were tokenized in the same way before.

    Raises UserError for a file, rows or a tokenizer that cannot be used, and whatever ``between_rows`` raises; then the
    cache is unchanged.
    """
    opened = open_source(source)
    folder = cache_dir / _fingerprint(opened, config, tokenizer, task.cache_key)
    if not folder.is_dir():
        documents, counts = _tokenize_source(opened, config, tokenizer, task, between_rows)
        lengths = [len(ids) for ids, _, _ in documents]
        groups = pack(lengths, config.max_length) if config.packing else [[index] for index in range(len(documents))]
        with atomic_folder(folder, if_taken="keep") as private:
            _write_rows(private / ROWS_FILE, documents, groups, between_rows)
            found = statistics(_blocks(private / ROWS_FILE), config.max_length, **counts)
            write_json(private / STATISTICS_FILE, asdict(found))
    return TokenRows(folder)


def _memory_map(path: Path) -> Dataset:
    return Dataset.from_file(str(path)).with_format("arrow")


def _blocks(path: Path) -> Iterator[RowBlock]:
    """All rows in order, about a thousand at a time, without a copy of the file."""
    first_row = 0
    for batch in _memory_map(path).data.to_batches():
        ids, labels, lengths, _ = (batch.column(name).flatten().to_numpy() for name in LISTS)
        yield RowBlock(first_row, ids, labels, lengths, batch.column("document_lengths").value_lengths().to_numpy())
        first_row += len(batch)


Tokens = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]  # ids, labels, types


def _tokenize_source(
    source: Source,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    task: RowTokenizer,
    between_rows: Callable[[], None],
) -> tuple[list[Tokens], dict[str, Any]]:
    bad = BadRows(source.settings.path, config.on_bad_row)
    documents: list[Tokens] = []
    num_good = num_dropped = num_truncated = num_split = 0
    rows = read_rows(source, bad, between_rows)
    while part := list(islice(rows, ROWS_PER_CALL)):
        between_rows()
        tokenized = task.tokenize(part, tokenizer, _loss_on(source), config.max_length)
        for row, found in zip(part, tokenized, strict=True):
            if isinstance(found, BadRowError):
                bad.add(row.place, found)
                continue
            num_good += 1
            num_split += len(found) > 1
            is_text = isinstance(row, PlainTextRow)
            for document in found:
                pieces = _pieces(document, config.max_length, divide=is_text)
                num_dropped += not pieces
                is_cut = document.truncated or (not is_text and len(document.ids) > config.max_length)
                num_truncated += bool(pieces) and is_cut
                documents += pieces
    bad.check(num_good)
    if not documents:
        raise UserError(
            f"no row of {source.settings.path} has a label within its first data.max_length={config.max_length} "
            "tokens. Raise data.max_length."
        )
    counts = {
        "skipped_by_reason": dict(bad.kinds),
        "num_dropped": num_dropped,
        "num_truncated": num_truncated,
        "num_split": num_split,
    }
    return documents, counts


def _pieces(document: Document, max_length: int, divide: bool) -> list[Tokens]:
    """The first ``max_length`` tokens or, where the document may be divided, all; without pieces that have no label."""
    pieces = []
    lists = (document.ids, document.labels, document.token_type_ids)
    for start in range(0, len(document.ids), max_length) if divide else (0,):
        ids, labels, types = (np.array(one[start : start + max_length], np.int32) for one in lists)
        if start:
            labels[0] = IGNORE_INDEX  # there is no token before it to predict it from
        if (labels != IGNORE_INDEX).any():
            pieces.append((ids, labels, types))
    return pieces


def _loss_on(source: Source) -> LossOn:
    assert source.settings.loss_on is not None
    return source.settings.loss_on


def _write_rows(
    path: Path,
    documents: Sequence[Tokens],
    groups: Sequence[Sequence[int]],
    between_rows: Callable[[], None],
) -> None:
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        for group in groups:
            between_rows()
            lists = zip(*(documents[index] for index in group), strict=True)
            input_ids, labels, token_type_ids = (np.concatenate(values) for values in lists)
            writer.write(
                {
                    "input_ids": input_ids,
                    "labels": labels,
                    "document_lengths": np.array([len(documents[index][0]) for index in group], np.int32),
                    "token_type_ids": token_type_ids,
                    "num_tokens": len(input_ids),
                    "num_label_tokens": int((labels != IGNORE_INDEX).sum()),
                }
            )
        writer.finalize()


def _fingerprint(source: Source, config: DataSection, tokenizer: PreTrainedTokenizerBase, task: str) -> str:
    """Hash of everything that determines the content of the rows."""
    parts = {
        "version": CACHE_VERSION,
        "task": task,
        "template_date": FIXED_DATE,
        "source": source.identity(),
        "tokenizer": _tokenizer_definition(tokenizer),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "config": config.model_dump(include={"max_length", "packing", "on_bad_row"}) | {"loss_on": _loss_on(source)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by the last call of the tokenizer; tokenize_rows sets its own.
    return {key: value for key, value in definition.items() if key not in ("truncation", "padding")}
