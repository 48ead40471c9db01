"""Data that cannot be used: one message with its place and what to do, and nothing in the cache."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from qvtune.config.data import DataSection
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.errors import UserError
from qvtune.tasks.causal_lm import TASK

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
LINE = json.dumps(PAIR).encode() + b"\n"
Build = Callable[..., TokenRows]


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Build:
    def build_rows(path: object, on_bad_row: str = "error", **source: Any) -> TokenRows:
        config = DataSection.model_validate({"train": {"path": str(path), **source}, "on_bad_row": on_bad_row})
        return build_token_rows(config.train_sources[0], config, tokenizer, TASK, tmp_path / "cache")

    return build_rows


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def saved_splits(folder: Path) -> None:
    splits = {"train": datasets.Dataset.from_list([PAIR]), "test": datasets.Dataset.from_list([PAIR])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")


def broken_shard(folder: Path) -> None:
    saved_splits(folder)
    (shard,) = (folder / "saved/train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:100])


Files = dict[str, bytes] | Callable[[Path], None]
GZIPPED = gzip.compress(LINE * 5000, mtime=0)
# What is wrong -> files, the path in their folder, settings of the source, and a pattern of the one message.
WHOLE: dict[str, tuple[Files, str, dict[str, Any], str]] = {
    "no such file": (
        {},
        "rows.jsonl",
        {},
        r"^cannot read {folder}/rows.jsonl: No such file or directory. Give a file, a",
    ),
    "no such file of a pattern": (
        {},
        "*.jsonl",
        {},
        r"^no file matches {folder}/\*.jsonl. Give a file, a folder, a patt",
    ),
    "an empty file": ({"rows.jsonl": b""}, "rows.jsonl", {}, r"^{folder}/rows.jsonl has no rows"),
    "blank lines only": ({"rows.jsonl": b"\n \n"}, "rows.jsonl", {}, r"^{folder}/rows.jsonl has no rows"),
    "a header only": ({"rows.csv": b"prompt,completion\n"}, "rows.csv", {}, r"^{folder}/rows.csv has no rows"),
    "an empty list": ({"rows.json": b"[]"}, "rows.json", {}, r"^{folder}/rows.json has no rows"),
    "an ending that nothing reads": (
        {"rows.dat": LINE},
        "rows.dat",
        {},
        r"^{folder}/rows.dat is of no known kind \('.dat'\). Files are told by their names: .jsonl, .ndjson, .json",
    ),
    "no ending": ({"rows": LINE}, "rows", {}, r"^{folder}/rows is of no known kind \(''\). Files are told by"),
    "an archive": ({"rows.zip": b"PK\3\4"}, "rows.zip", {}, r"rows.zip is an archive; unpack it and give the folder"),
    "a pickle": ({"rows.pkl": b"\x80"}, "rows.pkl", {}, r"rows.pkl is a pickle, .* save it as Parquet"),
    "a compressed table": ({"rows.parquet.gz": b""}, "rows.parquet.gz", {}, r"is compressed parquet; unpack it"),
    "a folder without data": (
        {"sub/notes.log": b"x"},
        "",
        {},
        r"^{folder} has no data: no file with one of the endings",
    ),
    "files of several kinds": (
        {"a.jsonl": LINE, "b.csv": b"text\nx\n"},
        "",
        {},
        r"^{folder} has files of several kinds \({folder}/b.csv is csv, {folder}/a.jsonl is jsonl\); give a pattern",
    ),
    "several splits in a folder": (
        {"train.jsonl": LINE, "test.jsonl": LINE},
        "",
        {},
        r"^{folder} has several splits: its files are of train, test; set `split`, or give a pattern",
    ),
    "a split that is not there": (
        {"train.jsonl": LINE, "test.jsonl": LINE},
        "",
        {"split": "dev"},
        r"^{folder} has no split 'dev': its files are of train, test; set `split`",
    ),
    "a split of a file": (
        {"rows.jsonl": LINE},
        "rows.jsonl",
        {"split": "train"},
        r"^`split: train` is for folders and hub",
    ),
    "a missing split of a saved data set": (
        saved_splits,
        "saved",
        {"split": "dev"},
        r"saved has no split 'dev': there are ",
    ),
    "no split of a saved data set": (
        saved_splits,
        "saved",
        {},
        r"saved has several splits: there are train, test; set `sp",
    ),
    "a shard that is cut off": (
        broken_shard,
        "saved",
        {"split": "train"},
        r"^{folder}/saved cannot be read as a folder of",
    ),
    "settings of a hub id": (
        {"rows.jsonl": LINE},
        "rows.jsonl",
        {"revision": "main", "streaming": True},
        r"^{folder}/rows.jsonl is on this machine; revision, streaming of a source are for hub ids: leave them out$",
    ),
    "compressed data that is cut off": (
        {"rows.jsonl.gz": GZIPPED[: len(GZIPPED) // 2]},
        "rows.jsonl.gz",
        {},
        r"^{folder}/rows.jsonl.gz: cannot be read to its end \(Compressed file ended .*\); copy or make it again$",
    ),
    "compressed in name only": (
        {"rows.jsonl.gz": LINE},
        "rows.jsonl.gz",
        {},
        r"cannot be read to its end \(Not a gzipped",
    ),
    "a binary file": (
        {"rows.jsonl": b"\x7fELF\0\0"},
        "rows.jsonl",
        {},
        r"rows.jsonl is a binary file, not text; name it",
    ),
    "Parquet under another name": (
        {"rows.jsonl": parquet([PAIR])},
        "rows.jsonl",
        {},
        r"^{folder}/rows.jsonl is a Parquet file, not text; name it as what it is$",
    ),
    "UTF-16": (
        {"rows.csv": "text\nx\n".encode("utf-16")},
        "rows.csv",
        {},
        r"^{folder}/rows.csv is text in UTF-16; save it ",
    ),
    "no Parquet": (
        {"rows.parquet": LINE},
        "rows.parquet",
        {},
        r"^{folder}/rows.parquet cannot be read as Parquet \(.*copy",
    ),
    "Parquet that is cut off": (
        {"rows.parquet": parquet([PAIR] * 99)[:-50]},
        "rows.parquet",
        {},
        r"^{folder}/rows.parquet cannot be read as Parquet \(.*\); copy or make it again$",
    ),
    "Arrow that is cut off": (
        {"rows.arrow": b"ARROW1"},
        "rows.arrow",
        {},
        r"^{folder}/rows.arrow cannot be read as Arrow ",
    ),
    "a wrong column of a table": (
        {"rows.csv": b"question,answer\na,b\n"},
        "rows.csv",
        {"columns": {"prompt": "querstion", "completion": "answer"}},
        r"^{folder}/rows.csv:2: it has no column 'querstion', which `columns` gives for prompt; its col",
    ),
    "unknown columns of a table": (
        {"rows.parquet": parquet([{"question": "a", "answer": "b"}] * 3)},
        "rows.parquet",
        {},
        r"^{folder}/rows.parquet row 1: the keys are \['answer', 'question'\], but it needs .* `columns` of",
    ),
    "a column that is there twice": (
        {"rows.csv": b"text,text\na,b\n"},
        "rows.csv",
        {},
        r":1: the header names a column twi",
    ),
    "numbers and names of columns": (
        {"rows.csv": b"a,b\n"},
        "rows.csv",
        {"columns": {"text": 1, "label": "b"}},
        r"^{folder}/rows.csv: `columns` has names and numbers; give names where the file has a header, else numbers$",
    ),
    "numbers of columns in JSONL": (
        {"rows.jsonl": LINE},
        "rows.jsonl",
        {"columns": {"text": 1}},
        r"^{folder}/rows.jsonl: numbers in `columns` are for CSV and TSV files without a header; give names$",
    ),
    "a list that is cut off": (
        {"rows.json": json.dumps([PAIR] * 9, indent=1).encode()[:-8]},
        "rows.json",
        {},
        r"^{folder}/rows.json:36: not JSON: Unterminated string .* at \(the file ends there: it may",
    ),
    "a list with a mistake": (
        {"rows.json": b'[\n{"text": "a"},\n{"text": a},\n' + b'{"text": "b"},\n' * 9999 + b"]"},
        "rows.json",
        {},
        r"^{folder}/rows.json:3: not JSON: Expecting value$",
    ),
    "an object of many lines": (
        {"rows.json": b'{\n"data": [\n]}\n'},
        "rows.json",
        {},
        r"begins with a JSON object of several",
    ),
    "JSONL as plain text": (
        {"rows.txt": LINE},
        "rows.txt",
        {},
        r"^{folder}/rows.txt looks like JSONL, but is named as plain ",
    ),
    "several formats": (
        {"rows.jsonl": json.dumps({**PAIR, "text": "2 + 2 = 4"}).encode()},
        "rows.jsonl",
        {},
        r"^{folder}/rows.jsonl:1: the columns are those of several formats: prompt_completion, text; set",
    ),
    "labelled text": (
        {"rows.tsv": b"text\tlabel\ngood\t1\n"},
        "rows.tsv",
        {},
        r"^{folder}/rows.tsv:2: a text with a label",
    ),
}


@pytest.mark.parametrize("what", WHOLE)
def test_data_that_cannot_be_used_at_all(what: str, build: Build, tmp_path: Path) -> None:
    """Bad rows may be skipped, but this is no matter of rows."""
    files, path, settings, message = WHOLE[what]
    folder = tmp_path / "data"
    folder.mkdir()
    if callable(files):
        files(folder)
    else:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        build(folder / path if path else folder, on_bad_row="skip", **settings)
    (problem,) = caught.value.problems[:1]
    assert re.search(message.replace("{folder}", re.escape(str(folder))), problem), problem
    assert list((tmp_path / "cache").glob("*")) == []


# What is wrong -> file and content, of which one row is good; line and reason of the bad one; kind.
ROWS: dict[str, tuple[str, bytes, str, str]] = {
    "a line that is no JSON": ("rows.jsonl", LINE + b"x\n", ":2: not JSON: Expecting value at column 1.", "not JSON"),
    "a last line that is half-written": (
        "rows.jsonl",
        LINE + LINE[:20],
        ":2: not JSON: Expecting ',' delimiter at column 21 (the file ends there, without a line end: it may",
        "not JSON",
    ),
    "another format": ("rows.jsonl", LINE + b'{"text": "a"}\n', ":2: a text row, but data.format", "another format"),
    "not UTF-8 in JSONL": ("rows.jsonl", LINE + b'{"\xff": 1}\n', ":2: not UTF-8 at byte 3 of the line.", "not UTF-8"),
    "not UTF-8 in CSV": ("rows.csv", b"text\na\n\xfcber\n", ":3: `text` is not UTF-8 at character 1.", "not UTF-8"),
    "not UTF-8 in plain text": (
        "rows.md",
        b"a\n" * 2**19 + b"a\n\xfc",
        ":524289: not UTF-8 in line 524290.",
        "not UTF-8",
    ),
    "NaN": (
        "rows.jsonl",
        LINE + b'{"prompt": NaN, "completion": "a"}\n',
        ":2: `prompt` must be text, found NaN.",
        "no text",
    ),
    "NaN in a table": (
        "rows.parquet",
        parquet([{"instruction": "a", "input": one, "output": "b"} for one in (None, 0.5)]),
        " row 2: `input` must be text, found number.",
        "no text",
    ),
    "null in a table": (
        "rows.parquet",
        parquet([PAIR, {"prompt": "a"}]),
        " row 2: `completion` must be text, found null.",
        "no",
    ),
    "too many fields": (
        "rows.csv",
        b"text\na\na,b\n",
        ":3: 2 fields, but the header has 1.",
        "another number of fields",
    ),
    "too few fields": (
        "rows.tsv",
        b"prompt\tcompletion\na\tb\na\n",
        ":3: 1 fields, but the header has 2.",
        "another number",
    ),
    "a quote that is not closed": (
        "rows.csv",
        b'prompt,completion\na,b\n"a,b\nc,d\n',
        ":3: not CSV: unexpected end of data (the row goes to line 4); is a quote not closed, or not doubled?.",
        "not CSV",
    ),
    "quotes that mean nothing": (
        "rows.tsv",
        b'prompt\tcompletion\na\tb\na\t"say ""a"""\n',
        ":3: a field in quotes with doubled quotes in it, but quotes mean nothing in a .tsv file; name it .csv.",
        "quoted as in CSV",
    ),
    "an item that is no object": (
        "rows.json",
        b'[{"text": "a"},\n1]',
        ":2 item 2: a JSON number, but each item must be",
        "not a",
    ),
    "an empty text": ("rows.csv", b'text\na\n" "\n', ":3: `text` is empty.", "empty text"),
    "no answer": (
        "rows.jsonl",
        LINE + b'{"prompt": "a", "completion": " "}\n',
        ":2: `completion` is empty.",
        "empty text",
    ),
}


@pytest.mark.parametrize("what", ROWS)
def test_one_bad_row_is_named_and_can_be_skipped(what: str, build: Build, tmp_path: Path) -> None:
    name, content, problem, kind = ROWS[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        build(tmp_path / name)
    assert caught.value.problems[0].startswith(f"{tmp_path / name}{problem}"), caught.value.problems
    assert caught.value.problems[1:] == ("1 rows are good; data.on_bad_row=skip skips the bad ones.",)
    assert list((tmp_path / "cache").glob("*")) == []
    statistics = build(tmp_path / name, on_bad_row="skip").statistics
    assert statistics["skipped"] == 1 and statistics["documents"]
    ((reason, count),) = statistics["skipped_by_reason"].items()
    assert reason.startswith(kind) and count == 1
