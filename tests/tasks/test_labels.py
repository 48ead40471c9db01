"""Labels of rows as integers, and rows as documents."""

from typing import Any

import numpy as np
import pytest
import torch

from qvtune.config.schema import ClassificationSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.rows import BadRowError, LabelledRow, TextRow
from qvtune.data.tokenize import Document
from qvtune.errors import UserError
from qvtune.tasks import get_task
from qvtune.tasks.labels import decode_scores, encode_score, mean_score, sorted_labels
from tests.support.tiny import make_encoder_tokenizer, make_tokenizer

SCORES = ClassificationSection(problem="regression")


def documents(tokenizer: Any, *rows: Any, settings: ClassificationSection, max_length: int = 64) -> list[Any]:
    return get_task("sequence_classification", settings).tokenize(list(rows), tokenizer, "answers", max_length)


def row(text: str, label: str = "yes", pair: str | None = None) -> LabelledRow:
    return LabelledRow("rows.tsv:7", text, pair, label)


def classes(*labels: str) -> ClassificationSection:
    return ClassificationSection(labels=labels or ("no", "yes"))


@pytest.mark.parametrize("score", ["3.6", "-100", "0", "1e-30", "65504.5"])
def test_a_score_comes_back(score: str) -> None:
    encoded = encode_score(score)
    assert decode_scores(torch.tensor([encoded, encoded])).tolist() == [np.float32(score)] * 2
    assert encoded != IGNORE_INDEX


def test_the_mean_of_scores_is_not_that_of_their_bits() -> None:
    encoded = np.array([encode_score(score) for score in ("1", "2.5", "4")], np.int32)
    assert mean_score(encoded) == 2.5


@pytest.mark.parametrize("label", ["", "high", "nan", "inf", "1e39"])
def test_what_is_no_score_is_a_bad_row(label: str) -> None:
    with pytest.raises(BadRowError, match="the label"):
        encode_score(label)


def test_labels_are_sorted_as_numbers_or_as_text() -> None:
    assert sorted_labels({"10", "9", "-1"}) == ("-1", "9", "10")
    assert sorted_labels({"b", "10", "a"}) == ("10", "a", "b")


@pytest.mark.parametrize(("labels", "message"), [(["a"] * 9, "1 different"), (map(str, range(1001)), "1001 different")])
def test_labels_that_are_none(labels: Any, message: str) -> None:
    task = get_task("sequence_classification")
    assert task.needs_labels
    with pytest.raises(UserError, match=f"{message}.*classification.problem: regression"):
        task.labels_of(row("text", label) for label in labels)


def test_a_pair_has_types_where_the_tokenizer_has_them() -> None:
    tokenizer = make_encoder_tokenizer()
    ((pair,), (single,)) = documents(tokenizer, row("hello world", "no", "be kind"), row("hello"), settings=classes())
    expected = tokenizer("hello world", "be kind")
    assert pair.ids == expected["input_ids"] and pair.token_type_ids == expected["token_type_ids"]
    assert sum(pair.token_type_ids) > 1 and pair.labels == [0, *[IGNORE_INDEX] * (len(pair.ids) - 1)]
    assert single.labels[0] == 1 and not any(single.token_type_ids)


def test_a_truncated_pair_keeps_its_special_tokens() -> None:
    tokenizer = make_encoder_tokenizer()
    ((found,),) = documents(tokenizer, row("hello " * 30, "no", "be kind"), settings=classes(), max_length=12)
    assert found.truncated and len(found.ids) == 12 and len(found.token_type_ids) == 12
    assert found.ids[-1] == tokenizer.sep_token_id and sum(found.token_type_ids) > 2, "the short text is whole"


def test_padding_at_the_end_is_no_text() -> None:
    """transformers takes the last token that is no padding."""
    tokenizer = make_tokenizer()
    ((plain,), (padded,), nothing) = documents(
        tokenizer, row("hello"), row("hello<|endoftext|>"), row("<|endoftext|>"), settings=classes()
    )
    assert isinstance(plain, Document) and padded == plain and plain.token_type_ids == []
    assert isinstance(nothing, BadRowError) and "no tokens" in str(nothing)


def test_bad_rows_say_why() -> None:
    rows = (row("text", "perhaps"), TextRow("rows.jsonl:1", "prompt", "completion"), row("text"))
    unknown, unlabelled, good = documents(make_tokenizer(), *rows, settings=classes())
    assert isinstance(unknown, BadRowError) and "'perhaps' is none of the 2 labels of the run (no, yes)" in str(unknown)
    assert isinstance(unlabelled, BadRowError) and "has no label" in str(unlabelled)
    assert isinstance(good, list)


def test_loss_on_has_no_effect_and_is_refused() -> None:
    with pytest.raises(UserError, match="loss_on: all has no effect with task: sequence_classification"):
        get_task("sequence_classification", classes()).tokenize([row("text")], make_tokenizer(), "all", 64)
