import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qvtune.config.schema import DataSection
from qvtune.data import IGNORE_INDEX, token_cache
from qvtune.data import dataset as dataset_module
from qvtune.data.batch import collate
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.rows import TextRow
from qvtune.data.tokenize import tokenize_rows
from qvtune.errors import UserError
from qvtune.tasks.causal_lm import TASK

WriteJsonl = Callable[..., Path]
PAIRS = [{"prompt": "hello", "completion": " world" * count} for count in (3, 1, 8, 2, 5, 1)]
COUNTS = ("documents", "skipped", "dropped", "truncated")


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., TokenRows]:
    def build_rows(path: Path, **settings: Any) -> TokenRows:
        config = DataSection.model_validate({"train": str(path), "max_length": 16, **settings})
        return build_token_rows(config.train_sources[0], config, tokenizer, TASK, tmp_path / "cache")

    return build_rows


def documents_of(rows: TokenRows) -> list[tuple[list[int], list[int]]]:
    documents = []
    for index in range(len(rows)):
        row = rows[index]
        bounds = np.cumsum(row.document_lengths)[:-1]
        for ids, labels in zip(np.split(row.input_ids, bounds), np.split(row.labels, bounds), strict=True):
            documents.append((ids.tolist(), labels.tolist()))
    return documents


@pytest.mark.parametrize("packing", [True, False, "dense"])
def test_rows_hold_every_document_whole(
    packing: Any, build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = build(write_jsonl(*PAIRS), packing=packing)
    expected = tokenize_rows([TextRow("rows.jsonl:1", **pair) for pair in PAIRS], tokenizer, "answers")
    documents = [(one.ids, one.labels) for of_row in expected if isinstance(of_row, list) for one in of_row]
    assert sorted(documents_of(rows)) == sorted(documents)
    assert [rows.statistics[name] for name in COUNTS] == [6, 0, 0, 0]
    assert len(rows) < 6 if packing else len(rows) == 6
    assert packing or documents_of(rows) == documents


def test_counts_a_row_are_those_of_the_loss(build: Callable[..., TokenRows], write_jsonl: WriteJsonl) -> None:
    rows = build(write_jsonl({"prompt": "", "completion": "hello"}, *PAIRS))
    for index in range(len(rows)):
        assert rows.num_tokens[index] == len(rows[index].input_ids) <= 16
        assert rows.num_label_tokens[index] == collate([rows[index]], 0).num_label_tokens
    assert rows.num_tokens.dtype == rows.num_label_tokens.dtype == np.int32
    assert rows[0].input_ids.dtype == rows[0].labels.dtype == rows[0].document_lengths.dtype == np.int32


def test_skipped_dropped_and_truncated_are_counted(build: Callable[..., TokenRows], write_jsonl: WriteJsonl) -> None:
    long_prompt = {"prompt": "hello " * 20, "completion": "x"}
    long_completion = {"prompt": "hello", "completion": " world" * 20}
    rows = build(write_jsonl(*PAIRS, "not JSON", long_prompt, long_completion), on_bad_row="skip")
    assert [rows.statistics[name] for name in COUNTS] == [7, 1, 1, 1]


def test_a_document_that_is_too_long_keeps_its_first_tokens(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl({"prompt": "hello", "completion": " world" * 20})
    [(whole_ids, whole_labels)] = documents_of(build(path, max_length=64))
    assert documents_of(build(path)) == [(whole_ids[:16], whole_labels[:16])]


def test_conversations_that_the_template_divides_are_counted(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    rows = build(write_jsonl({"messages": turns}, {"messages": turns[:2]}))
    assert [rows.statistics[name] for name in ("documents", "split")] == [3, 1]


def test_rows_that_the_template_refuses_count_as_bad(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<|im_start|>' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl({"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]})
    with pytest.raises(UserError) as caught:
        build(path)
    assert caught.value.problems[0] == f"{path}:2: the tokenizer's chat template refuses it: no system role."
    assert build(path, on_bad_row="skip").statistics["skipped"] == 1


def test_the_second_time_nothing_is_tokenized(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(*PAIRS)
    first = build(path)
    monkeypatch.setattr(token_cache, "in_processes", None)
    monkeypatch.setattr(dataset_module, "pack", None)
    second = build(path)
    assert documents_of(first) == documents_of(second)
    assert np.array_equal(first.num_label_tokens, second.num_label_tokens)


def test_whatever_changes_the_rows_changes_the_cache_folder(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(*PAIRS)
    build(path)
    build(path, format="prompt_completion")
    build(path, on_bad_row="skip")
    build(path, loss_on="all")
    tokenizer.add_tokens(["hello world"])
    build(path)
    tokenizer.eos_token = "<|endoftext|>"
    build(path)
    tokenizer.chat_template = "{{ messages }}"
    build(path)
    build(write_jsonl(*PAIRS[1:]))
    assert len(list((tmp_path / "cache").iterdir())) == 8
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    build(path)
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_an_error_leaves_nothing_behind(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: not JSON"):
        build(write_jsonl("x"))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(dataset_module, "_as_batch", lambda *_: 1 / 0)  # fails when the first rows are written
    with pytest.raises(ZeroDivisionError):
        build(write_jsonl(*PAIRS))
    (documents,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in documents.iterdir()} == {"documents-000000.arrow", "documents.json"}


def test_nothing_to_learn_within_the_length(build: Callable[..., TokenRows], write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match=r"first data.max_length=16 tokens. Raise data.max_length"):
        build(write_jsonl({"prompt": "hello " * 20, "completion": "x"}))


def test_other_lengths_and_packings_tokenize_nothing(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(*PAIRS)
    first = build(path)
    (folder,) = (tmp_path / "cache").iterdir()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("documents*")}
    monkeypatch.setattr(token_cache, "in_processes", None)
    assert len(build(path, packing=False)) == 6
    assert sorted(documents_of(build(path, packing="dense"))) == sorted(documents_of(first))
    assert build(path, max_length=8).statistics["truncated"] == 1
    assert build(path, max_length=8, on_long_row="split").statistics["long_split"] == 1
    assert documents_of(build(path)) == documents_of(first)
    assert len(list(folder.glob("rows-*"))) == 5
    assert {file: file.stat().st_mtime_ns for file in folder.glob("documents*")} == before


def test_other_weights_tokenize_nothing(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(*PAIRS)
    first = documents_of(build(path, train={"path": str(path), "weight": 0.5}))
    monkeypatch.setattr(token_cache, "in_processes", None)
    monkeypatch.setattr(dataset_module, "pack", None)
    assert documents_of(build(path, train={"path": str(path), "weight": 7})) == first


def test_rows_that_were_read_take_no_memory(
    build: Callable[..., TokenRows], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    rows = build(write_jsonl(*PAIRS * 500))
    assert sum(len(rows[index].input_ids) for index in range(len(rows))) == rows.statistics["tokens"]
    mapped = re.findall(r"(\S+\.arrow)\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    resident = {Path(name).name: int(kilobytes) for name, kilobytes in mapped if str(tmp_path) in name}
    assert "rows.arrow" in resident and not any(resident.values()), resident


def test_labels_of_first_tokens_are_ignored(build: Callable[..., TokenRows], write_jsonl: WriteJsonl) -> None:
    rows = build(write_jsonl(*[{"prompt": "", "completion": "hello"}] * 3))
    assert all(labels[0] == IGNORE_INDEX for _, labels in documents_of(rows))
