"""Packed rows -> text again, divided into what has labels and what has none."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow

_INCOMPLETE = "\ufffd"  # what decoding gives for the bytes of an unfinished character


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a document that all have a label, or all have none, as text."""

    text: str
    has_label: bool


def documents_as_text(row: PackedRow, tokenizer: Any) -> list[list[Span]]:
    """The spans of each document of a row. Together they are the decoded document, special tokens included."""
    borders = np.cumsum(row.document_lengths)[:-1]
    documents = zip(np.split(row.input_ids, borders), np.split(row.labels != IGNORE_INDEX, borders), strict=True)
    return [_spans(ids.tolist(), has_label, tokenizer) for ids, has_label in documents]


def _spans(ids: list[int], has_label: np.ndarray, tokenizer: Any) -> list[Span]:
    """Divide the text of the whole document: decoded alone a span would lose its first space in some tokenizers."""
    text = _decode(ids, tokenizer)
    borders = [0, *(np.flatnonzero(np.diff(has_label)) + 1).tolist(), len(ids)]
    places = [_num_characters(ids[:border], text, tokenizer) for border in borders[:-1]] + [len(text)]
    return [
        Span(text[start:end], bool(has_label[border]))
        for border, start, end in zip(borders, places, places[1:], strict=False)
    ]


def _num_characters(ids: list[int], text: str, tokenizer: Any) -> int:
    """Length of the part of ``text``, the whole document, that its first tokens ``ids`` are.

    A character that a token has begun and a later one completes belongs to the later one.
    """
    decoded = _decode(ids, tokenizer)
    return len(decoded if text.startswith(decoded) else decoded.rstrip(_INCOMPLETE))


def _decode(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
