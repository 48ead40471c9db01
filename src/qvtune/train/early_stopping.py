"""Whether training goes on: a function of the evaluations so far, which are in every checkpoint."""

from collections.abc import Mapping

from qvtune.config.schema import TrainSection
from qvtune.tasks.task import Task


def followed_metric(train: TrainSection, task: Task) -> tuple[str, bool]:
    """The metric that decides which checkpoint is the best, and whether a larger value is better."""
    if train.best_metric == "auto":
        return task.metric, task.higher_is_better
    return train.best_metric, train.best_metric != "loss"


def without_improvement(values: Mapping[int, float], higher_is_better: bool) -> int:
    """How many evaluations have followed the best one, the first of equal ones; ``values``: by step, at least one."""
    steps = sorted(values)
    best = (max if higher_is_better else min)(steps, key=values.__getitem__)
    return len(steps) - 1 - steps.index(best)
