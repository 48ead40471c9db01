"""A source of rows, opened: its files are found, and its records can be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qvtune.config.data import SourceSection
from qvtune.data.formats import Record, RowParser, excerpt
from qvtune.data.rows import BadRowError, BadRows, Row
from qvtune.data.sources import hub
from qvtune.data.sources.files import find_files, is_hub_id, saved_folder
from qvtune.data.sources.glue import located, recognised
from qvtune.data.sources.tables import read_arrow, read_dataset, read_parquet
from qvtune.data.sources.text_files import read_csv, read_json, read_jsonl, read_text, read_tsv
from qvtune.embedded.data import demo_files
from qvtune.errors import UserError
from qvtune.storage.paths import cache_dir
from qvtune.storage.recorded import recorded_sha256

HUB, SAVED = "hub", "saved"
_ONLY_ON_THE_HUB = ("name", "revision", "streaming")
_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "text": read_text,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_WITH_HEADER = ("csv", "tsv")
_ANY_COLUMNS = ("jsonl", "json")  # kinds whose rows may each have others


@dataclass(frozen=True)
class Source:
    """Where rows come from; ``open_source`` makes it.

    Attributes:
        settings: as written, with everything filled in that it takes over from ``data``.
        kind: a value of ``files.KINDS``, HUB or SAVED.
        files: in the order in which they are read; empty for HUB.
    """

    settings: SourceSection
    kind: str
    files: tuple[Path, ...]

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from number ``start`` (from 0) on, as far as ``max_rows`` allows. Raises UserError.

        Every record counts, bad ones too.
        """
        if self.kind in (HUB, SAVED):
            split = f" ({self.settings.split})" if self.settings.split else ""
            records = read_dataset(f"{self.settings.path}{split}", self._dataset)
        else:
            records = chain.from_iterable(map(self._reader(), self.files))
        return islice(records, start, self.settings.max_rows)

    def identity(self) -> dict[str, Any]:
        """What determines the records and how they are understood, for a cache's key. Reads files that have changed."""
        own = self.settings.model_dump(mode="json", include={"format", "columns", "max_rows"}) | {"kind": self.kind}
        own |= {} if self.settings.glue is None else {"glue": self.settings.glue}
        if self.kind == HUB:
            return own | hub.identity(self.settings, self._dataset)
        return own | {"sha256": [_sha256(file) for file in self.files]}

    def parser(self) -> RowParser:
        """Makes rows of the records; with ``format: auto`` the format is that of the first row that can be used.

        Raises UserError where the first row has columns of several formats, or a table has columns of none.
        """
        assert self.settings.format is not None
        columns = {str(ours): theirs for ours, theirs in self.settings.columns.items()}
        parser = RowParser(self.settings.format, columns, self.settings.glue)
        for record in self.records():
            try:
                value = parser.read(record)
                candidates = parser.candidates(value)
                if parser.format != "auto":
                    break
                if len(candidates) > 1:
                    raise UserError(_ambiguous(record.place, candidates, value))
                found = replace(parser, format=candidates[0])
                found.parse(record)
                return found
            except BadRowError as error:
                if error.concerns_columns and self.kind not in _ANY_COLUMNS:
                    raise UserError(f"{record.place}: {error}.") from error
        return parser

    @cached_property
    def _dataset(self) -> Any:
        return hub.load_hub(self.settings) if self.kind == HUB else hub.load_saved(self.settings)

    def _reader(self) -> Callable[[Path], Iterator[Record]]:
        has_header = not any(isinstance(column, int) for column in self.settings.columns.values())
        if self.kind == "csv":
            return partial(read_csv, has_header=has_header)
        if self.kind == "tsv":
            return partial(read_tsv, has_header=has_header, any_quotes=self.settings.glue is not None)
        return _READERS[self.kind]


def open_source(settings: SourceSection) -> Source:
    """Find the files of a source. Raises UserError where there are none, or a setting has no effect on them."""
    settings = located(settings)
    if settings.path == "demo":
        if settings.split not in ("train", "eval"):
            raise UserError(f"demo has the splits train and eval, not {settings.split!r}")
        train_file, eval_file = demo_files(cache_dir())
        source = Source(settings, "jsonl", (train_file if settings.split == "train" else eval_file,))
    elif is_hub_id(settings.path):
        source = Source(settings, HUB, ())
    elif saved_folder(settings.path):
        folder = Path(settings.path, settings.split or "")
        source = Source(settings, SAVED, tuple(sorted(folder.rglob("*.arrow"))))
    else:
        files, kind = find_files(settings.path, settings.split)
        source = Source(recognised(settings, files) if kind == "tsv" else settings, kind, files)
    _check_settings(source)
    return source


def read_rows(source: Source, bad: BadRows, max_rows: int | None = None) -> Iterator[Row]:
    """The rows of a source that can be used, or of its first ``max_rows`` records; the others are added to ``bad``.

    Raises UserError where the source cannot be read at all.
    """
    parser = source.parser()
    for record in islice(source.records(), max_rows):
        try:
            row = parser.parse(record)
        except BadRowError as error:
            bad.add(record.place, error)
        else:
            yield row


def _check_settings(source: Source) -> None:
    """Raises UserError with what was written and has no effect on a source of this kind."""
    settings, problems = source.settings, []
    given = [name for name in _ONLY_ON_THE_HUB if getattr(settings, name)] if source.kind != HUB else []
    if given:
        problems.append(
            f"{settings.path} is on this machine; {', '.join(given)} of a source are for hub ids: leave them out"
        )
    kinds = {type(column) for column in settings.columns.values()}
    if len(kinds) > 1:
        problems.append(
            f"{settings.path}: `columns` has names and numbers; give names where the file has a header, else numbers"
        )
    elif int in kinds and source.kind not in _WITH_HEADER:
        problems.append(f"{settings.path}: numbers in `columns` are for CSV and TSV files without a header; give names")
    if problems:
        raise UserError(problems)


def _ambiguous(place: str, candidates: list[str], value: dict[str, Any]) -> str:
    return (
        f"{place}: the columns are those of several formats: {', '.join(candidates)}; set data.format, or `format` of "
        f"the source, to one of them. The row is {excerpt(value)}"
    )


def _sha256(file: Path) -> str:
    try:
        return recorded_sha256(file, cache_dir() / "checksums")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error
