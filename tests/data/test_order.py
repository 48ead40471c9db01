import numpy as np
import pytest

from qvtune.data.order import epoch_order, rows_of_step


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)


def test_the_order_never_changes_between_versions() -> None:
    # A run that is resumed after an upgrade must go on where it was: these numbers are part of the format.
    assert epoch_order(10, seed=7, epoch=0).tolist() == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1]


def test_the_order_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 1


@pytest.mark.parametrize(("num_rows", "global_batch_size"), [(10, 4), (10, 5), (7, 7), (3, 8), (1, 2), (5, 1)])
def test_steps_follow_the_epochs_without_gap_or_overlap(num_rows: int, global_batch_size: int) -> None:
    num_steps = 3 * num_rows
    steps = np.concatenate([rows_of_step(step, global_batch_size, num_rows, seed=1) for step in range(num_steps)])
    epochs = [epoch_order(num_rows, 1, epoch) for epoch in range(3 * global_batch_size)]
    assert np.array_equal(steps, np.concatenate(epochs))


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    history = [rows_of_step(step, 6, 20, seed=3).tolist() for step in range(12)]
    for step in (11, 3, 7, 0):
        epoch_order.cache_clear()
        assert rows_of_step(step, 6, 20, seed=3).tolist() == history[step]
