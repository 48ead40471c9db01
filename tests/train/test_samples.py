"""The first training rows as text, which data.json keeps for the report."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qvtune.data import IGNORE_INDEX
from qvtune.data.order import rows_of_step
from qvtune.train.data import TRAIN, load_data, sample_rows
from tests.train.test_show_batch import make_config


def samples(folder: Path, model: Path, **data: Any) -> tuple[Any, list[list[dict[str, Any]]]]:
    config = make_config(folder, model, **data)
    loaded = load_data(config)
    return loaded.rows[TRAIN], sample_rows(config, loaded.rows[TRAIN], loaded.tokenizer)


def test_they_are_the_first_of_the_order_with_exactly_their_labels(tmp_path: Path, llama_folder: Path) -> None:
    rows, found = samples(tmp_path, llama_folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    assert len(found) == 2
    for index, documents in zip(rows_of_step(0, 2, len(rows), 3), found, strict=True):
        row = rows[index]
        assert len(documents) == len(row.document_lengths) > 1
        pieces = [piece for document in documents for piece in document["spans"]]
        assert "".join(text for text, _ in pieces) == tokenizer.decode(row.input_ids)
        labels = tokenizer.decode(row.labels[row.labels != IGNORE_INDEX])
        assert "".join(text for text, has_label in pieces if has_label) == labels
        assert {document["label"] for document in documents} == {None}


def test_long_documents_are_cut(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvtune.train.data._SAMPLE_CHARACTERS", 10)
    monkeypatch.setattr("qvtune.train.data._SAMPLE_DOCUMENTS", 1)
    _, found = samples(tmp_path, llama_folder)
    for (document,) in found:
        text = "".join(piece for piece, _ in document["spans"])
        assert text.endswith(" ...") and len(text) == 10 + len(" ...") and text.startswith("hello ")
