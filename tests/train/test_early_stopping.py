"""Patience counts evaluations since the best one, by the metric that is followed."""

import pytest

from qvtune.config.schema import ClassificationSection, TrainSection
from qvtune.tasks import get_task
from qvtune.train.early_stopping import followed_metric, without_improvement


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


def test_the_metric_is_that_of_the_task_or_the_chosen_one() -> None:
    settings = TrainSection(max_steps=1)
    assert followed_metric(settings, get_task("causal_lm")) == ("loss", False)
    classification = get_task("sequence_classification", ClassificationSection(metric="f1"))
    assert followed_metric(settings, classification) == ("f1", True)
    for metric, higher_is_better in (("loss", False), ("token_accuracy", True)):
        chosen = settings.model_copy(update={"best_metric": metric})
        assert followed_metric(chosen, get_task("causal_lm")) == (metric, higher_is_better)
