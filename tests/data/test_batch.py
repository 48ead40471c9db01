import numpy as np
import torch

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, collate, empty_batch
from qvtune.data.packing import PackedRow
from tests.support.separate import separate

X = IGNORE_INDEX


def packed(*documents: tuple[list[int], list[int]]) -> PackedRow:
    return PackedRow(
        input_ids=np.array([token for ids, _ in documents for token in ids], np.int32),
        labels=np.array([label for _, labels in documents for label in labels], np.int32),
        document_lengths=np.array([len(ids) for ids, _ in documents], np.int32),
    )


ROWS = [
    packed(([1, 2, 3], [X, X, 3]), ([4, 5, 6, 7], [X, 5, 6, X])),
    packed(([11, 12], [X, 12])),
]


def assert_equal(batch: Batch, other: Batch) -> None:
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "label_positions"):
        torch.testing.assert_close(getattr(batch, name), getattr(other, name), rtol=0, atol=0)
    assert batch.max_seqlen == other.max_seqlen


def test_collate_by_hand() -> None:
    expected = Batch(
        input_ids=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 99], [11, 12, 99, 99, 99, 99, 99, 99]]),
        labels=torch.tensor([[X, 3, X, 5, 6, X, X, X], [12, X, X, X, X, X, X, X]]),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5]]),
        cu_seqlens=torch.tensor([0, 3, 7, 8, 10, 16], dtype=torch.int32),
        max_seqlen=6,
        label_positions=torch.tensor([1, 3, 4, 8]),
    )
    batch = collate(ROWS, pad_token_id=99)
    assert_equal(batch, expected)
    assert batch.num_label_tokens == 4
    assert batch.labels.flatten()[batch.label_positions].tolist() == [3, 5, 6, 12]


def test_a_full_row_has_no_padding_document() -> None:
    batch = collate([packed(([1] * 8, [X, *[1] * 7]))], pad_token_id=99)
    assert batch.input_ids.shape == (1, 8)
    assert batch.cu_seqlens.tolist() == [0, 8]


def test_the_length_is_a_multiple_of_eight() -> None:
    assert collate([packed(([1] * 9, [X, *[1] * 8]))], pad_token_id=0).input_ids.shape == (1, 16)


def test_the_last_token_of_a_document_never_predicts_the_next_document() -> None:
    # Also where a row breaks the promise that a document's first token has no label.
    assert collate([packed(([1, 2], [X, 2]), ([3, 4], [3, 4]))], 0).labels[0, :4].tolist() == [2, X, 4, X]


def test_separate_gives_one_document_a_row() -> None:
    expected = Batch(
        input_ids=torch.tensor([[1, 2, 3, *[0] * 5], [4, 5, 6, 7, *[0] * 4], [11, 12, *[0] * 6]]),
        labels=torch.tensor([[X, 3, *[X] * 6], [5, 6, *[X] * 6], [12, *[X] * 7]]),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]]),
        cu_seqlens=torch.tensor([0, 3, 8, 12, 16, 18, 24], dtype=torch.int32),
        max_seqlen=6,
        label_positions=torch.tensor([1, 8, 9, 16]),
    )
    assert_equal(separate(collate(ROWS, pad_token_id=99)), expected)


def test_separate_twice_changes_nothing() -> None:
    once = separate(collate(ROWS, pad_token_id=0))
    assert_equal(separate(once), once)


def test_empty_batch_has_no_labels() -> None:
    batch = empty_batch(pad_token_id=5)
    assert batch.num_label_tokens == 0
    assert batch.input_ids.tolist() == [[5] * 8]
    assert batch.position_ids.tolist() == [list(range(8))]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 8], 8)


def test_types_and_device() -> None:
    batch = collate(ROWS, pad_token_id=0).to("meta")
    for name in ("input_ids", "labels", "position_ids", "label_positions"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).device.type == "meta"
    assert (batch.cu_seqlens.dtype, batch.cu_seqlens.device.type) == (torch.int32, "meta")
    assert batch.token_type_ids is None
