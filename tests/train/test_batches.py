"""The next batch is made while one is used, in order; what goes wrong comes when its batch is due."""

import threading
from collections.abc import Iterator

import pytest

from qvtune.train.batches import one_ahead


def test_in_order() -> None:
    assert list(one_ahead(lambda item: item * item, range(5))) == [0, 1, 4, 9, 16]
    assert list(one_ahead(str, [])) == []


def test_the_next_one_is_made_while_one_is_used_and_only_that() -> None:
    made = [threading.Event() for _ in range(4)]
    values = one_ahead(lambda item: made[item].set(), iter(range(4)))
    next(values)
    assert made[1].wait(timeout=10), "without asking for it"
    assert not made[2].is_set()
    next(values)
    assert made[2].wait(timeout=10)
    values.close()  # type: ignore[attr-defined]
    assert not made[3].is_set()


def test_it_is_made_by_another_thread() -> None:
    assert threading.get_ident() not in set(one_ahead(lambda _: threading.get_ident(), range(3)))


def test_items_without_end() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 7

    values = one_ahead(lambda item: item, forever())
    assert [next(values) for _ in range(3)] == [7, 7, 7]


def test_an_error_comes_when_its_value_is_due() -> None:
    values = one_ahead(lambda item: 12 // item, [3, 0])
    assert next(values) == 4
    with pytest.raises(ZeroDivisionError):
        next(values)
