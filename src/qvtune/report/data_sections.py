"""The section of a run's report about its data."""

from collections.abc import Mapping, Sequence
from typing import Any

from qvtune.report.chart import bar_chart
from qvtune.report.page import Figure, Part, Section, Table, Text

Values = Mapping[str, Any]
COUNTS = {  # a row of a table of statistics -> the field in data.json
    "rows": "rows",
    "documents": "documents",
    "tokens": "tokens",
    "label tokens": "label_tokens",
    "divided conversations": "split",
    "truncated documents": "truncated",
    "divided documents": "long_split",
    "too long documents": "long_dropped",
    "dropped documents": "dropped",
    "rows of the source": "source_rows",
    "skipped rows of the source": "skipped",
}
_SHARES = {"share of label tokens": "label_share", "packing density": "packing_density"}


def data(found: Values) -> Section:
    """Statistics, lengths, and the first rows with the text on which the loss is computed. ``found``: data.json."""
    if not found:
        return Section("Data", [])
    parts: list[Part | None] = [_statistics(found), *(_sources(name, one) for name, one in found.items())]
    parts += [_lengths(name, one) for name, one in found.items()]
    for one in found.values():
        parts += _samples(one.get("samples", []))
    return Section("Data", [part for part in parts if part is not None])


def _statistics(found: Values) -> Table:
    rows = [[label, *(_count(one.get(field)) for one in found.values())] for label, field in COUNTS.items()]
    rows += [[label, *(_share(one.get(field)) for one in found.values())] for label, field in _SHARES.items()]
    rows.append(["passes over the rows", *(_short(one.get("passes")) for one in found.values())])
    return Table("Statistics", ["", *found], [row for row in rows if any(row[1:])])


def _sources(name: str, one: Values) -> Table | None:
    """Of a data set that has several."""
    rows = []
    for part in one.get("sources", []):
        counts = [_count(part.get(field)) for field in ("rows", "tokens")]
        rows.append([part["source"], *counts, *(_short(part.get(field)) for field in ("weight", "passes"))])
    return Table(f"Sources of {name}", ["source", "rows", "tokens", "weight", "passes"], rows) if rows else None


def _lengths(name: str, one: Values) -> Figure | None:
    bars = [
        (f"{part['min_tokens']:,} to {part['max_tokens']:,} tokens", part["documents"], _count(part["documents"]))
        for part in one.get("document_lengths", [])
    ]
    return bar_chart(f"lengths-{name}", f"Documents of {name} by their length.", bars)


def _samples(rows: Sequence[Sequence[Values]]) -> list[Part]:
    """Rows of documents, each a mapping with ``spans``, pairs of a text and whether it has labels, and ``label``."""
    found: list[Part] = []
    if rows:
        found.append("The first rows of the training order. The loss is computed on marked text.")
    for number, documents in enumerate(rows, 1):
        for place, document in enumerate(documents, 1):
            title = f"row {number}, document {place} of {len(documents)}"
            title += f", label {document['label']}" if document.get("label") is not None else ""
            found.append(Text(title, [(text, bool(has_label)) for text, has_label in document["spans"]]))
    return found


def _count(value: Any) -> str:
    return f"{value:,}" if value else ""


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.1%}"


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"
