"""Rows as text: what has a label is shown as such, to the token."""

from collections.abc import Callable
from itertools import groupby

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow
from qvtune.data.rows import ChatRow, Row, TextRow
from qvtune.data.spans import Span, documents_as_text
from qvtune.data.tokenize import tokenize_rows
from tests.support.tiny import make_tokenizer

TURNS = ("Hi  there", "  hello\n\n world ", "naïve 東京 🙂?", "😀 yes\t")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space is a character of the token, and the text's first one is not decoded."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(["hello world yes Hi there what does it do"], trainer)
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def packed(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> PackedRow:
    documents = [one for found in tokenize_rows(rows, tokenizer, "answers") if isinstance(found, list) for one in found]
    ids, labels = ([getattr(document, name) for document in documents] for name in ("ids", "labels"))
    lengths = np.array([len(one) for one in ids], np.int32)
    return PackedRow(np.concatenate(ids).astype(np.int32), np.concatenate(labels).astype(np.int32), lengths)


def labelled_runs(row: PackedRow) -> list[list[int]]:
    """Consecutive label tokens of each document."""
    runs = []
    for labels in np.split(row.labels, np.cumsum(row.document_lengths)[:-1]):
        groups = groupby(labels.tolist(), key=lambda label: label != IGNORE_INDEX)
        runs += [list(run) for has_label, run in groups if has_label]
    return runs


def chat(*contents: str) -> ChatRow:
    roles = ("user", "assistant") * len(contents)
    return ChatRow(
        "rows.jsonl:1", tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False))
    )


def test_what_is_shown_as_trained_decodes_to_the_labels_and_nothing_else() -> None:
    tokenizer = make_tokenizer()
    row = packed([chat(*TURNS), TextRow("rows.jsonl:2", "what 東", "京 does\n"), chat("", "x")], tokenizer)
    documents = documents_as_text(row, tokenizer)
    trained = [span.text for spans in documents for span in spans if span.has_label]
    assert trained == [tokenizer.decode(run) for run in labelled_runs(row)]
    assert trained == [f"{TURNS[1]}<|im_end|>", f"{TURNS[3]}<|im_end|>", "京 does\n<|im_end|>", "x<|im_end|>"]
    assert [len(spans) for spans in documents] == [5, 2, 3], "the template ends with a line break that has no label"
    borders = np.cumsum(row.document_lengths)[:-1]
    for spans, ids in zip(documents, np.split(row.input_ids, borders), strict=True):
        assert "".join(span.text for span in spans) == tokenizer.decode(ids)
        assert [span.has_label for span in spans] == [bool(index % 2) for index in range(len(spans))]


def test_a_space_at_the_start_of_a_span_is_shown() -> None:
    """Decoded alone, the tokens of the completion would lose it."""
    tokenizer = sentencepiece_like()
    row = packed([TextRow("rows.jsonl:1", "hello", "world"), TextRow("rows.jsonl:2", "Hi 東", "京 yes")], tokenizer)
    assert tokenizer.decode(labelled_runs(row)[0]) == "world</s>"
    assert documents_as_text(row, tokenizer) == [
        [Span("hello", False), Span(" world</s>", True)],
        [Span("Hi 東", False), Span(" 京 yes</s>", True)],
    ]


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like])
def test_a_character_of_several_tokens_belongs_to_the_span_that_completes_it(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    ids = np.array(tokenizer("a🙂b", add_special_tokens=False)["input_ids"], np.int32)
    place = len(ids) - 2  # before the last byte
    labels = np.where(np.arange(len(ids)) < place, IGNORE_INDEX, ids)
    (spans,) = documents_as_text(PackedRow(ids, labels, np.array([len(ids)], np.int32)), tokenizer)
    assert spans == [Span("a", False), Span("🙂b", True)]


def test_a_document_without_labels_is_one_span() -> None:
    tokenizer = make_tokenizer()
    ids = np.array(tokenizer("hello")["input_ids"], np.int32)
    row = PackedRow(ids, np.full_like(ids, IGNORE_INDEX), np.array([len(ids)], np.int32))
    assert documents_as_text(row, tokenizer) == [[Span("hello", False)]]
