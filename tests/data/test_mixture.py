"""Several sources: their rows, their shares and their order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qvtune.data.mixture import JoinedRows, RowOrder
from qvtune.data.order import rows_of_step
from qvtune.data.packing import PackedRow

WEIGHTS = [0.5, 0.3, 0.2]
SIZES = [1000, 300, 70]


def first_rows(order: RowOrder, num_rows: int, batch_size: int = 8) -> NDArray[np.int64]:
    steps = [order.of_step(step, batch_size) for step in range(-(-num_rows // batch_size))]
    return np.concatenate(steps)[:num_rows]


def sources_of(rows: NDArray[np.int64], sizes: Sequence[int] = SIZES) -> NDArray[np.int64]:
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def test_shares_are_within_one_percent_over_any_2000_rows() -> None:
    sources = sources_of(first_rows(RowOrder(SIZES, WEIGHTS, seed=3), 20_000))
    for source, weight in enumerate(WEIGHTS):
        before = np.concatenate(([0], np.cumsum(sources == source)))
        shares = (before[2000:] - before[:-2000]) / 2000
        assert np.abs(shares - weight).max() < 0.01 * weight
        assert np.abs(before - weight * np.arange(len(before))).max() <= 1, "never more than a row from its share"


@pytest.mark.parametrize("weights", [[1e-6, 1.0], [1 / 3, 1 / 3, 1 / 3], [5, 3, 2], [0.1] * 20, [7.0, 1e-3, 11.0]])
def test_each_position_has_one_source_whatever_the_weights(weights: list[float]) -> None:
    sizes = [50] * len(weights)
    sources = sources_of(first_rows(RowOrder(sizes, weights, seed=0), 5000), sizes)
    counts = np.bincount(sources, minlength=len(weights))
    assert np.abs(counts - 5000 * np.array(weights) / sum(weights)).max() <= len(weights)


def test_only_ratios_count() -> None:
    orders = [RowOrder(SIZES, weights, seed=3) for weights in (WEIGHTS, [5, 3, 2], [0.05, 0.03, 0.02])]
    expected = first_rows(orders[0], 500)
    assert all(np.array_equal(first_rows(order, 500), expected) for order in orders[1:])


def test_a_source_is_visited_in_epochs_of_its_own() -> None:
    rows = first_rows(RowOrder(SIZES, WEIGHTS, seed=3), 5000)
    sources, starts = sources_of(rows), np.cumsum([0, *SIZES])
    for source, size in enumerate(SIZES):
        visits = rows[sources == source] - starts[source]
        epochs = [visits[first : first + size].tolist() for first in range(0, len(visits) - size + 1, size)]
        assert epochs and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch is in another order"
    equal = first_rows(RowOrder([50, 50], [1, 1], seed=0), 100)
    assert (equal[equal < 50]).tolist() != (equal[equal >= 50] - 50).tolist(), "and so is each source"


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    rows = first_rows(RowOrder(SIZES, WEIGHTS, seed=3), 3000, batch_size=6)
    for step in (499, 0, 250, 251):
        assert RowOrder(SIZES, WEIGHTS, seed=3).of_step(step, 6).tolist() == rows[6 * step : 6 * step + 6].tolist()
    assert np.array_equal(first_rows(RowOrder(SIZES, WEIGHTS, seed=3), 3000, batch_size=11), rows)


def test_a_step_far_away_is_as_near_as_the_first() -> None:
    far = RowOrder(SIZES, WEIGHTS, seed=3).of_step(10**12, 10)
    assert np.bincount(sources_of(far)).tolist() == [5, 3, 2]


def test_the_order_never_changes_between_versions() -> None:
    # A run that is resumed after an upgrade must go on where it was: these numbers are part of the format.
    assert RowOrder([4, 3, 2], WEIGHTS, seed=7).of_step(0, 12).tolist() == [3, 5, 0, 7, 2, 6, 1, 8, 1, 4, 3, 6]


@pytest.mark.parametrize("weights", [None, [], [3.0]])
def test_one_source_is_in_the_order_that_it_always_had(weights: list[float] | None) -> None:
    order = RowOrder([20], weights, seed=1)
    for step in range(9):
        assert order.of_step(step, 6).tolist() == rows_of_step(step, 6, 20, 1).tolist()


def test_without_weights_each_row_is_visited_once_per_epoch() -> None:
    order = RowOrder(SIZES, None, seed=1)
    assert sorted(first_rows(order, sum(SIZES)).tolist()) == list(range(sum(SIZES)))
    assert order.passes(2 * sum(SIZES)) == [2.0, 2.0, 2.0]


def test_passes_are_visits_per_row() -> None:
    order = RowOrder(SIZES, WEIGHTS, seed=1)
    rows = first_rows(order, sum(SIZES))
    visits = np.bincount(sources_of(rows))
    assert order.passes(sum(SIZES)) == [visit / size for visit, size in zip(visits.tolist(), SIZES, strict=True)]


class Source(Sequence[PackedRow]):
    """As much of TokenRows as is joined: row i of source s has the token 100 s + i."""

    def __init__(self, number: int, size: int) -> None:
        self.rows = [
            PackedRow(*(np.array([100 * number + index], np.int32) for _ in range(3))) for index in range(size)
        ]
        self.num_documents = 2 * size
        self.num_tokens = np.arange(size, dtype=np.int32) + 100 * number
        self.num_label_tokens = self.num_tokens + 1
        self.statistics: dict[str, Any] = {
            "rows": size,
            "documents": 2 * size,
            "tokens": 30 * size,
            "label_tokens": 10 * size,
            "label_share": 0.5,
            "packing_density": 0.5,
            "skipped_by_reason": {"not JSON": number, "empty": 1},
            "document_lengths": [{"min_tokens": 2**number, "max_tokens": 2 ** (number + 1) - 1, "documents": size}],
            "label_lengths": [{"min_tokens": 1, "max_tokens": 1, "documents": size}],
            "longest": [{"row": 1, "document": 0, "tokens": 5 + number, "label_tokens": 2}],
            "crc32": f"0000000{number}",
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def documents(self, index: int) -> NDArray[np.int64]:
        return np.array([2 * index + 1, 2 * index])


def test_rows_are_numbered_through_all_sources() -> None:
    joined = JoinedRows([Source(0, 3), Source(1, 2), Source(2, 4)], max_length=100)
    tokens = [0, 1, 2, 100, 101, 200, 201, 202, 203]
    assert [int(joined[index].input_ids[0]) for index in range(len(joined))] == tokens
    assert joined.num_tokens.tolist() == tokens
    assert joined.num_label_tokens.tolist() == [token + 1 for token in tokens]
    assert [joined.documents(index).tolist() for index in (0, 2, 3, 5)] == [[1, 0], [5, 4], [7, 6], [11, 10]]
    assert joined.num_documents == 18
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            joined[outside]


def test_statistics_are_those_of_all_sources() -> None:
    first, second = Source(0, 3), Source(1, 2)
    found = JoinedRows([first, second], max_length=100).statistics
    assert (found["rows"], found["documents"], found["tokens"], found["label_tokens"]) == (5, 10, 150, 50)
    assert (found["label_share"], found["packing_density"]) == (50 / 150, 150 / 500)
    assert found["skipped_by_reason"] == {"not JSON": 1, "empty": 2}
    assert [(one["min_tokens"], one["documents"]) for one in found["document_lengths"]] == [(1, 3), (2, 2)]
    assert found["label_lengths"] == [{"min_tokens": 1, "max_tokens": 1, "documents": 5}]
    assert [(one["row"], one["tokens"]) for one in found["longest"]] == [(4, 6), (1, 5)]
    assert found["crc32"] != JoinedRows([second, first], max_length=100).statistics["crc32"]
    assert JoinedRows([first], max_length=100).statistics == first.statistics
