"""The page: everything in one file, nothing in it that a browser would load or run, and no text that becomes markup."""

import re
from html.parser import HTMLParser

import pytest

from qvtune.report.drawing import drawing, finished
from qvtune.report.page import Figure, Page, Section, Table, Value, as_html, as_markdown

HOSTILE = '<script>alert("x")</script> & | *a* _b_'


class Tags(HTMLParser):
    """Counts tags, requires that they are closed in order, and collects text and ids."""

    EMPTY = ("meta", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def figure(name: str) -> Figure:
    with drawing(3, 2) as canvas:
        axis = canvas.subplots()
        axis.plot([1, 2, 4], [3, 1, 2], label=name)
        axis.set_xlim(1.5, 3)
        axis.legend()
        return finished(canvas, name, f"caption of {name}")


def page() -> Page:
    rows = [["plain", Value("9.5", "a note\nof two lines", "best")], [HOSTILE, Value("8.0", HOSTILE, "failed")]]
    sections = [
        Section("First", [HOSTILE, Table("A table", ["name", "value"], rows), figure("one")]),
        Section("Second", [figure("two")]),
    ]
    return Page(f"Title {HOSTILE}", [("fact", HOSTILE)], sections)


def test_the_page_is_well_formed_complete_and_needs_nothing_else() -> None:
    made = as_html(page())
    tags = Tags(made)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    addresses = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)|@import', made)
    assert {(first or second)[0] for first, second in addresses} == {"#"}
    assert tags.seen.count("svg") == 2 and tags.seen.count("td") == 4
    assert tags.text.count(HOSTILE) == 6  # two titles, fact, paragraph, label, note
    assert 'class="best"><span class="value">9.5</span><small>a note\nof two lines</small>' in made


def test_each_picture_of_a_page_has_its_own_ids_and_finds_them() -> None:
    made = as_html(page())
    ids = Tags(made).ids
    assert len(ids) > 20 and len(set(ids)) == len(ids)
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', made))
    assert len(used) > 4 and {first or second for first, second in used} <= set(ids)


def test_the_same_page_has_the_same_bytes() -> None:
    assert as_html(page()) == as_html(page())
    assert figure("one") == figure("one")
    assert figure("one").png.startswith(b"\x89PNG")


def test_markdown_has_the_table_and_links_to_the_pictures() -> None:
    made = as_markdown(page(), "pictures")
    assert "| plain | **9.5** (a note<br>of two lines) |" in made
    assert made.count("![caption of ") == 2 and "](pictures/two.svg)" in made
    assert "<script>" not in made and r"\| \*a\* \_b\_" in made
    (table,) = re.findall(r"(?:^\|.*\n)+", made, re.MULTILINE)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {3}


def test_rows_must_fit_their_table() -> None:
    with pytest.raises(AssertionError, match="A table"):
        Table("A table", ["name", "value"], [["only a name"]])
