import random

import pytest

from qvtune.data.packing import pack


def best_fit_decreasing(lengths: list[int], max_length: int) -> list[int]:
    """Return how full each row gets, by looking at every row for every document."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, fill in enumerate(filled) if fill + length <= max_length]
        if fitting:
            filled[max(fitting, key=lambda index: filled[index])] += length
        else:
            filled.append(length)
    return sorted(filled)


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_within_the_length_and_as_full_as_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    max_length = draw.randint(1, 60)
    lengths = [draw.randint(1, max_length) for _ in range(draw.randint(1, 200))]
    rows = pack(lengths, max_length)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    filled = [sum(lengths[document] for document in row) for row in rows]
    assert max(filled) <= max_length
    assert sorted(filled) == best_fit_decreasing(lengths, max_length)
    assert rows == pack(lengths, max_length)


def test_by_hand() -> None:
    # 7 and 6 open rows; 4 fits the row with 4 left; 3 and 1 fill the row with 3 left and the new row's rest
    assert pack([3, 7, 4, 6, 1], 10) == [[1, 0], [3, 2], [4]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_no_row_can_hold_is_a_defect(length: int) -> None:
    with pytest.raises(AssertionError):
        pack([3, length], 10)
