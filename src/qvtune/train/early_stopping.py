"""Whether training goes on: a function of the evaluations so far, which are in every checkpoint."""

from collections.abc import Mapping


def without_improvement(values: Mapping[int, float], higher_is_better: bool) -> int:
    """How many evaluations have followed the best one, the first of equal ones; ``values``: by step, at least one."""
    steps = sorted(values)
    best = (max if higher_is_better else min)(steps, key=values.__getitem__)
    return len(steps) - 1 - steps.index(best)
