"""One self-contained page of sections with text, tables and figures: HTML without script or network, and Markdown.

The same input gives the same bytes.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "best", "second", "failed", "missing"]


@dataclass(frozen=True)
class Value:
    """A table's cell: its text, a note in small print, and how it is marked (best: bold; second: underlined).

    Both may have several lines.
    """

    text: str
    note: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """``rows`` have as many cells as ``columns``; the first ``num_labels`` columns name the row, the others are right
    aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Value]]
    num_labels: int = 1

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


@dataclass(frozen=True)
class Figure:
    """A picture: ``name`` of its files without an ending, and both formats of it; without ``png`` it is only shown on
    the page."""

    name: str
    caption: str
    svg: str
    png: bytes = b""


@dataclass(frozen=True)
class Text:
    """Text as it is, with its spaces and lines, in pieces; those with True are marked."""

    title: str
    pieces: Sequence[tuple[str, bool]]


Part = str | Table | Figure | Text


@dataclass(frozen=True)
class Section:
    """Paragraphs, tables, figures and texts under a heading, in their order."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """``facts``: name and value, shown under the title."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    def figures(self) -> list[Figure]:
        """All figures, in order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Figure)]


_STYLE = """
:root { --ink: #1d2530; --soft: #5b6675; --line: #dde2e8; --tint: #f5f7f9; --accent: #0b6e6e; --bad: #a3301c; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white; font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--accent); }
p { max-width: 52rem; margin: .5rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
nav { margin: 1.4rem 0 0; padding: .6rem .9rem; background: var(--tint); border-radius: 6px; }
nav a { color: var(--accent); text-decoration: none; margin-right: 1.3rem; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
.table { overflow-x: auto; margin: 1rem 0 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .3rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: pre; } td.prose { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); vertical-align: bottom; }
thead th { border-bottom: 2px solid var(--soft); }
th.label, td.label { text-align: left; }
tbody tr:hover { background: var(--tint); }
td small { display: block; color: var(--soft); font-size: .75rem; line-height: 1.3; }
td.best .value { font-weight: 700; } td.second .value { text-decoration: underline; text-underline-offset: 3px; }
td.failed .value { color: var(--bad); font-weight: 600; }
td.failed small { white-space: normal; width: 13rem; margin-left: auto; }
td.missing .value { color: var(--soft); font-style: italic; }
pre.text { background: var(--tint); border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap; }
pre.text { overflow-wrap: anywhere; font-size: .85rem; line-height: 1.45; margin: .3rem 0 1rem; }
pre.text { max-height: 30rem; overflow-y: auto; }
.title { font-weight: 600; } mark { background: #cdeede; color: inherit; }
figure { margin: 1.2rem 0 1.6rem; }
figure.chart { display: inline-table; vertical-align: top; margin-right: 1.1rem; max-width: 100%; }
figure.chart figcaption { display: table-caption; caption-side: bottom; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 52rem; margin-top: .4rem; }
@media print { nav { display: none; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } pre.text { max-height: none; } }
"""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<h1>{{ page.title }}</h1>
{% if page.facts %}
<dl>
{% for name, value in page.facts %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
<nav>
{% for section in page.sections %}
<a href="#section-{{ loop.index }}">{{ section.title }}</a>
{% endfor %}
</nav>
{% for section in page.sections %}
<section id="section-{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part is string %}
<p>{{ part }}</p>
{% elif part.columns is defined %}
<div class="table">
<table>
{% if part.title %}
<caption>{{ part.title }}</caption>
{% endif %}
<thead><tr>
{% for column in part.columns %}
<th{% if loop.index0 < part.num_labels %} class="label"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in part.rows %}
<tr>
{%- for cell in row %}
{%- set label = "label" if loop.index0 < part.num_labels else "" %}
{%- if cell is string -%}
<td{% if label %} class="{{ label }}{{ " prose" if cell|length > 60 }}"{% endif %}>{{ cell }}</td>
{%- else -%}
<td class="{{ [label, cell.mark]|select|join(' ') }}"><span class="value">{{ cell.text }}</span>
{%- if cell.note %}<small>{{ cell.note }}</small>{% endif %}</td>
{%- endif %}
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% elif part.pieces is defined %}
{% if part.title %}
<p class="title">{{ part.title }}</p>
{% endif %}
<pre class="text">
{%- for text, is_marked in part.pieces -%}
{%- if is_marked -%}<mark>{{ text }}</mark>{%- else -%}{{ text }}{%- endif -%}
{%- endfor -%}
</pre>
{% else %}
<figure{{ " class=chart" if not part.png }} role="img" aria-label="{{ part.caption }}">
{{ inline(part)|safe }}
<figcaption>{{ part.caption }}</figcaption>
</figure>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def as_html(page: Page) -> str:
    """One file with everything in it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(_TEMPLATE)
    # The style and the pictures are the program's own; everything else is escaped.
    return template.render(page=page, style=_STYLE, inline=_inline)


def _inline(figure: Figure) -> str:
    """The picture without what only a file of its own needs, and with names that no other picture has."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", figure.name)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg).strip()


def as_markdown(page: Page, figures: str = "figures") -> str:
    """For GitHub and the like; pictures are linked in the folder ``figures``."""
    lines = [f"# {_escaped(page.title)}", ""]
    lines += [f"- {_escaped(name)}: {_escaped(value)}" for name, value in page.facts]
    for section in page.sections:
        lines += ["", f"## {_escaped(section.title)}"]
        for part in section.parts:
            lines += ["", *_markdown_part(part, figures)]
    return "\n".join(lines) + "\n"


def _markdown_part(part: Part, figures: str) -> list[str]:
    if isinstance(part, str):
        return [_escaped(part)]
    if isinstance(part, Text):
        lines = "".join(text for text, _ in part.pieces).splitlines()
        return [_escaped(part.title), "", *(f"    {line}" for line in lines)]
    if isinstance(part, Figure):
        return [f"![{_escaped(part.caption)}]({figures}/{part.name}.svg)", "", f"*{_escaped(part.caption)}*"]
    aligned = ["---" if number < part.num_labels else "---:" for number in range(len(part.columns))]
    rows = [[_markdown_cell(cell) for cell in row] for row in part.rows]
    table = [_line([_escaped(column) for column in part.columns]), _line(aligned), *map(_line, rows)]
    return [f"**{_escaped(part.title)}**", "", *table] if part.title else table


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: str | Value) -> str:
    if isinstance(cell, str):
        return _escaped(cell)
    marks = {"": "{}", "best": "**{}**", "second": "<u>{}</u>", "failed": "**{}**", "missing": "*{}*"}
    text = marks[cell.mark].format(_escaped(cell.text)) if cell.text else ""
    return f"{text} ({_escaped(cell.note)})" if cell.note else text


def _escaped(text: str) -> str:
    """Nothing of it is taken for Markdown or HTML; lines are kept within a table's cell."""
    lines = (re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(line, quote=False)) for line in text.splitlines())
    return "<br>".join(lines)
