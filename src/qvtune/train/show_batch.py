"""``launch/train.py --show-batch``: first rows as text, with what is trained on, and statistics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.data.mixture import Rows
from qvtune.data.spans import Span, documents_as_text
from qvtune.report.data_sections import COUNTS
from qvtune.train.data import TRAIN, RunData, data_statistics, load_data, row_order

OPEN, CLOSE = "⟦", "⟧"  # around what has labels, for output without colours
_HAS_LABEL = "black on green"
_BAR_WIDTH = 16
_EXCERPT_CHARACTERS = 60
# Control characters would not be seen, or would control the terminal.
_VISIBLE = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show_batch(config: RunConfig, num_rows: int) -> None:
    """Print the first ``num_rows`` packed rows of the training order, then statistics of all rows.

    Works without a process group, a GPU and the base's weights, and leaves the run folder alone. Raises UserError, as
    training does, where the tokenizer or the data cannot be used.
    """
    data = load_data(config)
    out = console()
    _show_rows(out, config, data, num_rows)
    _show_statistics(out, config, data)


def _show_rows(out: Console, config: RunConfig, data: RunData, num_rows: int) -> None:
    rows, batch_size = data.rows[TRAIN], config.train.global_batch_size
    if data.task.label_of(rows[0], 0) is None:
        shown = _marked("like this")
        out.print(Text.assemble("Text on which the loss is computed (label tokens) looks ", shown, ".\n"))
    # The order's first positions, whatever the batch size: step s takes positions s*B to (s+1)*B.
    for position, index in enumerate(row_order(config, rows).of_step(0, num_rows).tolist()):
        row = rows[index]
        documents = documents_as_text(row, data.tokenizer)
        step, place = divmod(position, batch_size)
        counts = f"tokens {rows.num_tokens[index]}, label tokens {rows.num_label_tokens[index]}"
        title = f"step {step + 1}, row {place + 1} of {batch_size}: documents {len(documents)}, {counts}"
        out.rule(title, align="left")
        for number, (spans, length) in enumerate(zip(documents, row.document_lengths, strict=True)):
            heading = f"-- document {number + 1} of {len(documents)}: tokens {length}"
            label = data.task.label_of(row, number)
            if label is not None:  # of the document, kept at its first token
                heading += f", label {_visible(label)}"
                spans = [replace(span, has_label=False) for span in spans]
            out.print(Text(heading, style="bold"))
            out.print(as_text(spans), soft_wrap=True)
        out.print()


def as_text(spans: Iterable[Span]) -> Text:
    """A document for the console: spans with a label are coloured, and stand between OPEN and CLOSE."""
    return Text.assemble(*(_marked(span.text) if span.has_label else _visible(span.text) for span in spans))


def _marked(text: str) -> Text:
    return Text(f"{OPEN}{_visible(text)}{CLOSE}", style=_HAS_LABEL)


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _show_statistics(out: Console, config: RunConfig, data: RunData) -> None:
    """First all data sets side by side, then the lengths of the documents of each."""
    found = data_statistics(config, data.rows)
    table = _table("", *(Column(setting, justify="right") for setting in found))
    for name, field in COUNTS.items():
        table.add_row(name, *(f"{one[field]:,}" for one in found.values()))
    table.add_row("share of label tokens", *(f"{one['label_share']:.1%}" for one in found.values()))
    density = f"packing density: tokens / (rows * {config.data.max_length})"
    table.add_row(density, *(f"{one['packing_density']:.1%}" for one in found.values()))
    out.rule("data", align="left")
    for setting, one in found.items():
        for source in one.get("sources", [one]):
            out.print(Text(f"{setting}: {source['source']}"), soft_wrap=True)
    out.print(table)
    for setting, one in found.items():
        if "sources" in one:
            out.print()
            out.rule(f"{setting}: sources", align="left")
            out.print(_sources(one["sources"]))
    for setting, one in found.items():
        out.print()
        out.rule(f"{setting}: lengths of documents", align="left")
        out.print(_histogram(one))
        out.print()
        out.print(_longest(one, data.rows[setting], data))


def _sources(sources: Sequence[Mapping[str, Any]]) -> Table:
    """What each source of a data set has, and how much of it is trained on."""
    counted, shared = ("rows", "documents", "tokens"), ("weight", "passes")
    table = _table("source", *(Column(name, justify="right") for name in (*counted, *shared)))
    for one in sources:
        counts = [f"{one[name]:,}" for name in counted]
        shares = [f"{one[name]:.3g}" if name in one else "" for name in shared]
        table.add_row(Text(one["source"]), *counts, *shares)
    return table


def _histogram(statistics: Mapping[str, Any]) -> Table:
    """How many documents have so many tokens, and how many have so many label tokens."""
    by_length, by_labels = (
        {(one["min_tokens"], one["max_tokens"]): one["documents"] for one in statistics[name]}
        for name in ("document_lengths", "label_lengths")
    )
    largest = max(*by_length.values(), *by_labels.values())
    names = ("tokens", "documents", "by label tokens")
    tokens, lengths, labels = (Column(name, justify="right", no_wrap=True) for name in names)
    table = _table(tokens, lengths, "", labels, "")
    for bounds in sorted({*by_length, *by_labels}):
        counts = by_length.get(bounds, 0), by_labels.get(bounds, 0)
        cells = [cell for count in counts for cell in (f"{count:,}", _bar(count, largest))]
        table.add_row(" to ".join(map(str, dict.fromkeys(bounds))), *cells)
    return table


def _bar(count: int, largest: int) -> str:
    """At least one character where there is anything."""
    return "#" * -(-count * _BAR_WIDTH // largest)


def _longest(statistics: Mapping[str, Any], rows: Rows, data: RunData) -> Table:
    """Lengths, and the first words that have labels, or the documents' own labels."""
    columns = [Column(name, justify="right", no_wrap=True) for name in ("longest", "label tokens")]
    table = _table(*columns, Column("text of the labels", no_wrap=True))
    for one in statistics["longest"]:
        row, document = rows[one["row"]], one["document"]
        spans = documents_as_text(row, data.tokenizer)[document]
        label = data.task.label_of(row, document) or "".join(span.text for span in spans if span.has_label)
        words = " ".join(label.split())
        table.add_row(f"{one['tokens']:,}", f"{one['label_tokens']:,}", Text(_visible(words[:_EXCERPT_CHARACTERS])))
    return table


def _table(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))
