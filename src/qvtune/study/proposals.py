"""Which learning rates to try next: Optuna as a function from what has been tried to new points.

The study exists in memory for the length of a call, and is made from the results every time. So there is no second
record of a search beside the run folders.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Point = tuple[float, ...]
Box = tuple[tuple[float, float], ...]  # lowest and highest value of each rate; searched on a logarithmic scale
Tried = tuple[tuple[Point, float], ...]  # points and their losses


@cache
def spread(box: Box, count: int, seed: int) -> list[Point]:
    """``count`` points that fill the box evenly (scrambled Sobol' sequence)."""
    import optuna

    with _quiet():
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
        middle = tuple((low * high) ** 0.5 for low, high in box)
        return _ask(sampler, box, ((middle, 0.0),), count)  # it takes its box from the first trial


@cache
def promising(box: Box, tried: Tried, count: int, seed: int) -> list[Point]:
    """``count`` points where a Gaussian process, fitted to the losses of what was tried, expects improvement."""
    import optuna

    with _quiet():
        return _ask(optuna.samplers.GPSampler(seed=seed, n_startup_trials=0), box, tried, count)


def _ask(sampler: Any, box: Box, tried: Tried, count: int) -> list[Point]:
    import optuna

    names = [f"rate {number}" for number in range(len(box))]
    distributions: dict[str, optuna.distributions.BaseDistribution]
    distributions = {
        name: optuna.distributions.FloatDistribution(*ends, log=True) for name, ends in zip(names, box, strict=True)
    }
    study = optuna.create_study(sampler=sampler)
    for point, loss in tried:
        values = dict(zip(names, point, strict=True))
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=loss))
    asked = [study.ask(distributions) for _ in range(count)]  # a point that was asked for is pending for the next one
    return [tuple(trial.params[name] for name in names) for trial in asked]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines about new studies, and its warnings that the samplers are experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
