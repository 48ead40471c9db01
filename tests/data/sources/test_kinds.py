"""The same rows from every kind of file, and data as it is published."""

import bz2
import csv
import gzip
import json
import lzma
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from qvtune.config.data import SourceSection
from qvtune.data.rows import BadRows, ChatRow, LabelledRow, PlainTextRow, Row, TextRow
from qvtune.data.sources.source import open_source, read_rows

PAIRS = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": 'a "quoted" word, and a comma', "completion": "two\nlines\n\nand a\ttab"},
    {"prompt": "", "completion": "ünïcode 東京 \u2028 \U0001f600"},
    {"prompt": '"', "completion": "'; a semicolon"},
]
Rows = list[dict[str, Any]]


def write_csv(path: Path, rows: Rows, **options: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_zstd(path: Path, content: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def write_arrow(path: Path, rows: Rows, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


# Name of the file or folder -> how it is written there.
WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress(jsonl(rows[:1])) + gzip.compress(jsonl(rows[1:]))
    ),
    "rows.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(jsonl(rows))),
    "rows.ndjson.xz": lambda path, rows: path.write_bytes(lzma.compress(jsonl(rows))),
    "rows.jsonl.zst": lambda path, rows: write_zstd(path, jsonl(rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "lines.json": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.csv": write_csv,
    "semicolons.csv": lambda path, rows: write_csv(path, rows, delimiter=";"),
    "tabs.csv": lambda path, rows: write_csv(path, rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    "stream.arrow": lambda path, rows: write_arrow(path, rows, pa.ipc.new_stream),
    "file.arrow": lambda path, rows: write_arrow(path, rows, pa.ipc.new_file),
    "saved": lambda path, rows: Dataset.from_list(rows).save_to_disk(path, num_shards=2),
}


def source_of(path: object, **settings: Any) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), "format": "auto", **settings})


def rows_of(path: object, **settings: Any) -> list[Row]:
    bad = BadRows(str(path), "error")
    rows = list(read_rows(open_source(source_of(path, **settings)), bad))
    bad.check(len(rows))
    return rows


def without_place(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(row).items() if name != "place"} for row in rows]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, PAIRS)
    rows = rows_of(tmp_path / name)
    assert without_place(rows) == PAIRS
    assert all(row.place.startswith(str(tmp_path / name)) for row in rows)
    assert len({row.place for row in rows}) == len(rows)


CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "2 + 2?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "add",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
            },
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": "4"},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": None},
]


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(".csv")])
def test_conversations_are_the_same_from_lines_and_from_tables(name: str, tmp_path: Path) -> None:
    """A table has every key in every message."""
    WRITERS[name](tmp_path / name, CHATS)
    expected = [{"messages": tuple(one["messages"]), "first_reply": 0} for one in CHATS]
    expected[0]["tools"], expected[1]["tools"] = tuple(CHATS[0]["tools"]), None
    assert without_place(rows_of(tmp_path / name)) == expected


def test_conversations_in_a_csv_file_are_json(tmp_path: Path) -> None:
    rows = [{name: json.dumps(value) for name, value in one.items() if value} for one in CHATS]
    write_csv(tmp_path / "rows.csv", [{"tools": "", **one} for one in rows])
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl", CHATS)
    assert without_place(rows_of(tmp_path / "rows.csv")) == without_place(rows_of(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_places_are_lines(name: str, tmp_path: Path) -> None:
    """Of the beginning of a row that has several."""
    WRITERS[name](tmp_path / name, PAIRS)
    lines = {
        "rows.jsonl": ["1", "2", "3", "4"],
        "rows.json": ["2 item 1", "6 item 2", "10 item 3", "14 item 4"],
        "rows.csv": ["2", "3", "7", "8"],
    }[name]
    assert [row.place for row in rows_of(tmp_path / name)] == [f"{tmp_path / name}:{line}" for line in lines]


@pytest.mark.parametrize(("name", "places"), [("rows.parquet", ["rows.parquet row 1", "rows.parquet row 2"])])
def test_places_in_a_table_are_rows(name: str, places: list[str], tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, PAIRS[:2])
    assert [row.place for row in rows_of(tmp_path / name)] == [str(tmp_path / place) for place in places]


def test_a_tsv_file_as_glue_has_them(tmp_path: Path) -> None:
    """A byte-order mark, Windows' line ends, quotes that are not closed, names that are no words."""
    path = tmp_path / "train.tsv"
    lines = ["Quality\t#1 ID\t#1 String\t#2 String", '1\t7\t"He said\tAnd "she"', "0\t8\t'a\tb"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    columns = {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}
    assert rows_of(path, columns=columns) == [
        LabelledRow(f"{path}:2", '"He said', 'And "she"', "1"),
        LabelledRow(f"{path}:3", "'a", "b", "0"),
    ]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
def test_a_table_without_a_header_has_numbers_for_columns(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("a good film\t1\na bad one\t0\n")
    rows = rows_of(path, columns={"text": 1, "label": 2})
    assert rows == [
        LabelledRow(f"{path}:1", "a good film", None, "1"),
        LabelledRow(f"{path}:2", "a bad one", None, "0"),
    ]


def test_texts_are_whole_files(tmp_path: Path) -> None:
    for name, text in {"b.txt": "two\n\nthree", "a.txt": "one\r\n"}.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "README.md").write_text("about the others")
    assert rows_of(tmp_path) == [
        PlainTextRow(f"{tmp_path}/a.txt:1", "one\r\n"),
        PlainTextRow(f"{tmp_path}/b.txt:1", "two\n\nthree"),
    ]


def test_a_long_text_is_read_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(200_000))
    (tmp_path / "long.txt").write_text(text)
    rows = rows_of(tmp_path / "long.txt")
    assert len(rows) == 3 and "".join(row.text for row in rows) == text  # type: ignore[union-attr]
    assert all(row.text.endswith("\n") for row in rows)  # type: ignore[union-attr]
    number = int(rows[1].place.rpartition(":")[2])
    assert rows[1].text.startswith(f"line {number - 1}\n")  # type: ignore[union-attr]


def test_a_list_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "completion": "\\\u00e9[{}]," * (number % 3000)} for number in range(1, 400)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert without_place(rows_of(tmp_path / "rows.json")) == rows
    assert (tmp_path / "rows.json").stat().st_size > 2**20


def test_sharegpt_and_alpaca_as_they_are_published(tmp_path: Path) -> None:
    """A list of objects with further keys."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"id": "a_0", "conversations": turns}], indent=1))
    alpaca = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca], indent=4))
    (chat,) = rows_of(tmp_path / "sharegpt.json")
    (task,) = rows_of(tmp_path / "alpaca.json")
    assert isinstance(chat, ChatRow) and [one["content"] for one in chat.messages] == ["Hi", "Hello"]
    assert isinstance(task, ChatRow) and [one["content"] for one in task.messages] == ["Add.\n\n2 + 2", "4"]


def test_patterns_and_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for number, name in enumerate(["data/train-2.jsonl", "data/train-1.jsonl", "test.jsonl", ".hidden.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([{"text": str(number)}]))
    assert without_place(rows_of(tmp_path / "**/*-[12].jsonl")) == [{"text": "1"}, {"text": "0"}]
    assert without_place(rows_of(tmp_path / "data")) == [{"text": "1"}, {"text": "0"}]
    assert without_place(rows_of(tmp_path, split="train")) == [{"text": "1"}, {"text": "0"}]
    assert without_place(rows_of(tmp_path, split="test")) == [{"text": "2"}]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl").write_bytes(jsonl(PAIRS))
    assert len(rows_of(tmp_path / "rows[1].jsonl")) == len(PAIRS)


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    splits = DatasetDict({"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(PAIRS[:1])})
    splits.save_to_disk(tmp_path / "saved")
    assert len(rows_of(tmp_path / "saved", split="train")) == len(PAIRS)
    assert len(rows_of(tmp_path / "saved", split="test")) == 1
    assert len(rows_of(tmp_path / "saved/test")) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "saved"])
def test_first_rows_and_the_rest(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, PAIRS)
    assert len(rows_of(tmp_path / name, max_rows=3)) == 3
    source = open_source(source_of(tmp_path / name, max_rows=3))
    whole = list(source.records())
    assert list(source.records(start=2)) == whole[2:] and len(whole) == 3


def test_records_and_parsers_go_to_other_processes(tmp_path: Path) -> None:
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl", PAIRS)
    source = open_source(source_of(tmp_path / "rows.jsonl"))
    sent = pickle.loads(pickle.dumps((source.parser(), list(source.records()))))  # noqa: S301
    assert [sent[0].parse(record) for record in sent[1]] == rows_of(tmp_path / "rows.jsonl")
    assert isinstance(sent[0].parse(sent[1][0]), TextRow)


def test_the_identity_is_that_of_the_rows(tmp_path: Path) -> None:
    """The same files elsewhere are the same source; other content, order, columns or number of rows are not."""

    def identity(path: Path, **settings: Any) -> str:
        return json.dumps(open_source(source_of(path, **settings)).identity(), sort_keys=True)

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(["a.jsonl", "b.jsonl"]):
            (tmp_path / folder / name).write_bytes(jsonl(PAIRS[number:]))
    first = identity(tmp_path / "one")
    assert identity(tmp_path / "two") == first
    others = [
        identity(tmp_path / "one", max_rows=2),
        identity(tmp_path / "one", format="prompt_completion"),
        identity(tmp_path / "one", columns={"text": "prompt"}),
        identity(tmp_path / "one/a.jsonl"),
    ]
    (tmp_path / "one/b.jsonl").write_bytes(jsonl(PAIRS))
    assert len({first, identity(tmp_path / "one"), *others}) == 6


@pytest.mark.parametrize("split", ["train", "eval"])
def test_demo_has_two_splits(split: str) -> None:
    rows = rows_of("demo", split=split, max_rows=5)
    assert len(rows) == 5 and f"{split}.jsonl:1" in rows[0].place
