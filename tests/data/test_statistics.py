"""Numbers of a data set, against ones that are counted by hand and one document at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qvtune.config.schema import DataSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.packing import PackedRow
from qvtune.data.statistics import NUM_LONGEST, Bin, LongDocument, RowBlock, Statistics, statistics
from qvtune.tasks.causal_lm import TASK

WriteJsonl = Callable[..., Path]


def block(*rows: list[tuple[int, int]], first_row: int = 0, token: int = 5) -> RowBlock:
    """Rows of documents, each given by its tokens and how many of them, the last ones, are label tokens."""
    documents = [document for row in rows for document in row]
    ids = np.full(sum(length for length, _ in documents), token, np.int32)
    labels = [[IGNORE_INDEX] * (length - num_labels) + [token] * num_labels for length, num_labels in documents]
    lengths = np.array([length for length, _ in documents], np.int32)
    num_documents = np.array([len(row) for row in rows], np.int32)
    return RowBlock(first_row, ids, np.concatenate(labels).astype(np.int32), lengths, num_documents)


COUNTS: dict[str, Any] = {
    "source_rows": 9,
    "split": 4,
    "truncated": 1,
    "long_split": 5,
    "long_dropped": 6,
    "dropped": 2,
    "skipped": 3,
    "skipped_by_reason": {"not JSON": 3},
}


def count(*blocks: RowBlock) -> Statistics:
    return statistics(blocks, 10, COUNTS)


def test_numbers_counted_by_hand() -> None:
    found = count(block([(4, 1), (6, 4)], [(2, 1)]), block([(8, 7)], [(3, 1), (3, 2), (4, 3)], first_row=2))
    assert (found.rows, found.documents, found.tokens, found.label_tokens) == (4, 7, 30, 19)
    assert found.label_share == 19 / 30
    assert found.packing_density == 30 / 40
    assert {name: getattr(found, name) for name in COUNTS} == COUNTS
    assert found.document_lengths == [Bin(2, 3, 3), Bin(4, 7, 3), Bin(8, 10, 1)]
    assert found.label_lengths == [Bin(1, 1, 3), Bin(2, 3, 2), Bin(4, 7, 2)]
    assert found.longest == [
        LongDocument(row=2, document=0, tokens=8, label_tokens=7),
        LongDocument(row=0, document=1, tokens=6, label_tokens=4),
        LongDocument(row=0, document=0, tokens=4, label_tokens=1),
        LongDocument(row=3, document=2, tokens=4, label_tokens=3),
        LongDocument(row=3, document=0, tokens=3, label_tokens=1),
    ]


@pytest.mark.parametrize("max_length", [8, 15, 16])
def test_the_last_bin_ends_at_the_longest_possible_document(max_length: int) -> None:
    found = statistics([block([(8, 1)])], max_length, COUNTS)
    assert found.document_lengths == [Bin(8, min(15, max_length), 1)]


def test_the_checksum_depends_on_tokens_labels_and_borders_and_not_on_blocks() -> None:
    whole = count(block([(4, 1)], [(6, 4)]))
    assert count(block([(4, 1)], [(6, 4)])) == whole
    others = (
        block([(4, 1)], [(6, 4)], token=6),
        block([(4, 2)], [(6, 3)]),
        block([(6, 1)], [(4, 3)]),
    )
    assert len({whole.crc32, *(count(other).crc32 for other in others)}) == 4


def counted_one_by_one(rows: TokenRows) -> dict[str, int]:
    packed: list[PackedRow] = [rows[index] for index in range(len(rows))]
    return {
        "rows": len(packed),
        "documents": sum(len(row.document_lengths) for row in packed),
        "tokens": sum(len(row.input_ids) for row in packed),
        "label_tokens": sum(int((row.labels != IGNORE_INDEX).sum()) for row in packed),
    }


@pytest.mark.parametrize("packing", [True, False])
def test_the_statistics_of_a_file_are_kept_with_its_rows(
    packing: bool, write_jsonl: WriteJsonl, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """More rows than Arrow writes in one batch."""
    pairs = [{"prompt": "hello", "completion": " world" * (1 + index % 7)} for index in range(1500)]
    long = {"prompt": "hello", "completion": " world" * 20}
    path = write_jsonl(*pairs, long, "not JSON")
    config = DataSection(train=str(path), max_length=16, packing=packing, on_bad_row="skip")
    (source,) = config.train_sources
    rows = build_token_rows(source, config, tokenizer, TASK, tmp_path / "cache")
    found = rows.statistics
    assert {name: found[name] for name in ("rows", "documents", "tokens", "label_tokens")} == counted_one_by_one(rows)
    assert (found["truncated"], found["dropped"], found["skipped"]) == (1, 0, 1)
    for histogram in ("document_lengths", "label_lengths"):
        assert sum(one["documents"] for one in found[histogram]) == found["documents"] == 1501
    assert len(found["longest"]) == NUM_LONGEST and found["longest"][0]["tokens"] == 16
    for one in found["longest"]:
        assert rows[one["row"]].document_lengths[one["document"]] == one["tokens"]
    again = build_token_rows(source, config, tokenizer, TASK, tmp_path / "another cache")
    assert again.statistics == found
