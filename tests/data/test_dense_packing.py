import random

import pytest

from qvtune.data.dense_packing import pack_dense
from qvtune.data.packing import pack


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_within_the_length(seed: int) -> None:
    draw = random.Random(seed)
    max_length = draw.randint(1, 200)
    lengths = [draw.randint(1, max(1, max_length // draw.randint(1, 9))) for _ in range(draw.randint(1, 300))]
    rows = pack_dense(lengths, max_length)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert max(sum(lengths[document] for document in row) for row in rows) <= max_length
    assert rows == pack_dense(lengths, max_length)


@pytest.mark.parametrize(("mean", "density"), [(80, 0.95), (220, 0.99)])
def test_less_padding_than_best_fit_decreasing(mean: int, density: float) -> None:
    """Lengths that spread as those of real questions and answers do: the demo's, and GSM8K's."""
    draw = random.Random(0)
    max_length = {80: 256, 220: 2048}[mean]
    lengths = [min(max_length, int(draw.gauss(mean, mean / 4)) + draw.randrange(mean // 2)) for _ in range(5000)]
    rows = pack_dense(lengths, max_length)
    assert len(rows) < len(pack(lengths, max_length))
    assert sum(lengths) / (len(rows) * max_length) > density


def test_the_order_of_the_documents_does_not_matter_much() -> None:
    """A file that is sorted by length is as dense as any."""
    draw = random.Random(1)
    lengths = [draw.randint(90, 500) for _ in range(3000)]
    shuffled, ascending = len(pack_dense(lengths, 2048)), len(pack_dense(sorted(lengths), 2048))
    assert abs(shuffled - ascending) <= 3


def test_by_hand() -> None:
    assert pack_dense([], 10) == []
    assert sorted(map(sorted, pack_dense([7, 3, 6, 4], 10))) == [[0, 1], [2, 3]]
    assert [len(row) for row in pack_dense([5, 5, 5], 10)] == [2, 1]


def test_a_length_that_no_row_can_hold_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        pack_dense([3, 11], 10)
