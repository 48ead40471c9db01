"""Patience counts evaluations since the best one."""

import pytest

from qvtune.train.early_stopping import without_improvement


@pytest.mark.parametrize(
    ("values", "higher_is_better", "expected"),
    [
        ([3.0], False, 0),
        ([3.0, 2.0, 1.0], False, 0),
        ([3.0, 1.0, 2.0, 1.5], False, 2),
        ([3.0, 1.0, 2.0, 1.5], True, 3),
        ([0.5, 0.5, 0.5], True, 2),  # equal is not better
        ([0.5, 0.4, 0.6], True, 0),
    ],
)
def test_evaluations_since_the_best(values: list[float], higher_is_better: bool, expected: int) -> None:
    by_step = {10 * number: value for number, value in enumerate(values)}
    assert without_improvement(dict(reversed(by_step.items())), higher_is_better) == expected
