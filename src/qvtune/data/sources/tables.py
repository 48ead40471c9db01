"""Parquet, Arrow and data sets of ``datasets`` -> records."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvtune.data.formats import Record
from qvtune.errors import UserError

_ROWS_AT_A_TIME = 1000


def read_parquet(file: Path) -> Iterator[Record]:
    """One record a row."""
    try:
        with pq.ParquetFile(file) as opened:
            # One by one: over all row groups a reader keeps what it has read.
            groups = (opened.iter_batches(_ROWS_AT_A_TIME, [group]) for group in range(opened.num_row_groups))
            yield from _records(str(file), chain.from_iterable(groups))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet ({error}); copy or make it again") from error


def read_arrow(file: Path) -> Iterator[Record]:
    """One record a row; the file is a stream, as ``datasets`` writes it, or has an index."""
    try:
        with pa.OSFile(str(file)) as opened:
            yield from _records(str(file), _batches(opened))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Arrow ({error}); copy or make it again") from error


def read_dataset(name: str, rows: Any) -> Iterator[Record]:
    """One record a row of a ``Dataset`` or an ``IterableDataset``, decoded to Python's types."""
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for number, value in enumerate(rows, start=1):
            yield Record(f"{name} row {number}", _without_missing_keys(value))
    except (pa.ArrowException, OSError, DatasetsError) as error:
        raise UserError(f"{name} cannot be read after row {number} ({error}); try again, or copy it again") from error


def _batches(opened: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if opened.read(6) == b"ARROW1":
        index = pa.ipc.open_file(opened)
        yield from map(index.get_batch, range(index.num_record_batches))
    else:
        opened.seek(0)
        yield from pa.ipc.open_stream(opened)


def _records(name: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, len(batch), _ROWS_AT_A_TIME):
            for value in batch.slice(start, _ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield Record(f"{name} row {number}", _without_missing_keys(value))


def _without_missing_keys(value: dict[str, Any]) -> dict[str, Any]:
    """In a column all objects have the same keys; those that one of them lacks are null."""
    return {name: _without_nulls(one) if isinstance(one, list | dict) else one for name, one in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
