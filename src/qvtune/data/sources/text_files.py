"""Files of text -> records: JSONL, a JSON list, CSV, TSV and plain text, also compressed."""

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from qvtune.data.formats import Record
from qvtune.data.messages import json_type
from qvtune.data.rows import BadRowError
from qvtune.data.sources.json_list import list_items
from qvtune.errors import UserError

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")),
}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE_BYTES = 2**20  # of plain text in a record
_MAX_FIELD_CHARACTERS = 2**27
_QUOTED_AS_CSV = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
_SIGNATURES = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"ARROW1": "Arrow"}


def read_jsonl(file: Path) -> Iterator[Record]:
    """One record a line that is not blank."""
    for line, raw in _lines(file):
        if not raw.isspace():
            yield Record(f"{file}:{line}", raw)


def read_json(file: Path) -> Iterator[Record]:
    """One record an item of a list; a file that does not begin with a bracket is read as JSONL."""
    first = next((raw for _, raw in _lines(file) if not raw.isspace()), b"[]")
    if first.lstrip().startswith(b"["):
        yield from _items(file)
        return
    if first.strip() in (b"{", b'{"') or not first.strip().endswith(b"}"):
        raise UserError(f"{file} begins with a JSON object of several lines; give a list of objects, or one per line")
    yield from read_jsonl(file)


def _items(file: Path) -> Iterator[Record]:
    with _opened(file) as stream, _readable(file):
        items = list_items(file, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
        for number, (line, item) in enumerate(items, start=1):
            problem = BadRowError(f"a JSON {json_type(item)}, but each item must be an object", "not a JSON object")
            yield Record(f"{file}:{line} item {number}", item if isinstance(item, dict) else problem)


def read_csv(file: Path, has_header: bool) -> Iterator[Record]:
    """One record a row; fields in quotes may hold line breaks. The delimiter is a comma, semicolon or tab."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    first = next((_decoded(raw) for _, raw in _lines(file)), "")
    delimiter = next((one for one in ",;\t" if len(next(csv.reader([first], delimiter=one), [])) > 1), ",")
    reader = csv.reader((_decoded(raw) for _, raw in _lines(file)), delimiter=delimiter, strict=True)
    yield from _table(file, _csv_rows(reader), has_header)


def read_tsv(file: Path, has_header: bool, any_quotes: bool = False) -> Iterator[Record]:
    """One record a line; quotes are ordinary characters, as in the files of GLUE.

    Fields that look like those of CSV are bad, unless ``any_quotes`` says that the file is known to mean them so.
    """
    rows = ((line, _decoded(raw).rstrip("\r\n").split("\t")) for line, raw in _lines(file) if not raw.isspace())
    for record in _table(file, rows, has_header):
        fields = record.value.values() if isinstance(record.value, dict) else ()
        if not any_quotes and any(map(_QUOTED_AS_CSV.fullmatch, fields)):
            reason = "a field in quotes with doubled quotes in it, but quotes mean nothing in a .tsv file; name it .csv"
            record = Record(record.place, BadRowError(reason, "quoted as in CSV"))
        yield record


def tsv_header(file: Path) -> list[str]:
    """The fields of the first line; empty where the file is."""
    return next((_decoded(raw).rstrip("\r\n").split("\t") for _, raw in _lines(file)), [])


def read_text(file: Path) -> Iterator[Record]:
    """One record, ``text``, for a file of up to a MiB; more for a larger one, each of which ends with a line."""
    first_line, size, piece = 1, 0, []
    for line, raw in _lines(file):
        if line == 1 and raw.lstrip().startswith(b'{"'):
            raise UserError(f"{file} looks like JSONL, but is named as plain text; name it .jsonl")
        piece.append(raw)
        size += len(raw)
        if size >= _PIECE_BYTES:
            yield _text_record(file, first_line, piece)
            first_line, size, piece = line + 1, 0, []
    if any(not raw.isspace() for raw in piece):
        yield _text_record(file, first_line, piece)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        opener = _OPENERS.get(file.suffix.lower())
        stream = file.open("rb") if opener is None else opener(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}.") from error
    with stream:
        yield cast(BinaryIO, stream)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """A file whose bytes cannot be had is no matter of single rows."""
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{file}: cannot be read to its end ({error}); copy or make it again") from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line with its end. Raises UserError for what is no text."""
    with _opened(file) as stream, _readable(file):
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                _require_text(file, raw)
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            yield line, raw


def _require_text(file: Path, start: bytes) -> None:
    found = next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), None)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} is text in UTF-16; save it as UTF-8")
    if found is not None or b"\0" in start:
        raise UserError(f"{file} is {'a ' + found if found else 'a binary'} file, not text; name it as what it is")


def _decoded(raw: bytes) -> str:
    """Bytes that are not UTF-8 become what ``messages.text`` refuses."""
    return raw.decode("utf-8", errors="surrogateescape")


def _csv_rows(reader: Any) -> Iterator[tuple[int, list[str] | BadRowError]]:
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = f" (the row goes to line {reader.line_num})" if reader.line_num > first_line else ""
            yield first_line, BadRowError(f"not CSV: {error}{end}; is a quote not closed, or not doubled?", "not CSV")
        else:
            if fields:
                yield first_line, fields


def _table(file: Path, rows: Iterator[tuple[int, Any]], has_header: bool) -> Iterator[Record]:
    names: Sequence[Any] | None = None
    for line, fields in rows:
        place = f"{file}:{line}"
        if isinstance(fields, BadRowError):
            yield Record(place, fields)
            continue
        if names is None:
            names = fields if has_header else range(1, len(fields) + 1)
            if len(set(names)) < len(names):
                raise UserError(f"{place}: the header names a column twice: {', '.join(fields)}")
            if has_header:
                continue
        if len(fields) == len(names):
            yield Record(place, dict(zip(names, fields, strict=True)))
        else:
            what = "header" if has_header else "first row"
            reason = f"{len(fields)} fields, but the {what} has {len(names)}"
            yield Record(place, BadRowError(reason, "another number of fields"))


def _text_record(file: Path, first_line: int, piece: list[bytes]) -> Record:
    place = f"{file}:{first_line}"
    content = b"".join(piece)
    try:
        return Record(place, {"text": content.decode("utf-8")})
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        return Record(place, BadRowError(f"not UTF-8 in line {line}", "not UTF-8"))
