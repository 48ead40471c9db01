"""Is one setting better than another? Paired bootstrap over evaluation rows and seeds.

Both settings are evaluated on the same rows and trained with the same seeds, so the noise that they share cancels in
their difference. Rows are resampled with replacement (Koehn, EMNLP 2004). The few seeds are not: 2 to 5 runs resampled
with replacement give intervals that are much too narrow. The mean over seeds is drawn from Student's t instead, which
gives the exact interval where the difference is normally distributed over seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
# How often each row was drawn, [resamples, rows] -> the value of the metric for each seed, [resamples, seeds].
Metric = Callable[[Array], Array]

_ENTRIES = 4_000_000  # of the matrix of counts that are in memory at once


@dataclass(frozen=True)
class Comparison:
    """``difference`` of the metric, second minus first setting, mean over seeds, with its interval [low, high].

    ``p_value``: two-sided, of no difference; never below 1 / (number of resamples). With one seed the interval knows
    the noise of the rows alone.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_rows: int
    num_seeds: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation over seeds of the difference of two settings, and the degrees of freedom it is known with."""

    deviation: float
    degrees: int


def mean_of(values: ArrayLike, weights: ArrayLike | None = None) -> Metric:
    """Sum of ``values`` [seeds, rows] over that of ``weights`` [rows], e.g. nats per row and label tokens per row.

    Without weights it is the mean over rows, e.g. accuracy of 0 and 1.
    """
    values = np.asarray(values, dtype=float)
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    return lambda counts: (counts @ values.T) / (counts @ weights)[:, None]


def correlation_of(predictions: ArrayLike, labels: ArrayLike) -> Metric:
    """Pearson's correlation of ``predictions`` [seeds, rows] and ``labels`` [rows].

    Of two classes, as 0 and 1, it is Matthews' coefficient. Where one of the two is constant it is 0, as in
    scikit-learn.
    """
    x, y = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)

    def correlation(counts: Array) -> Array:
        shares = counts / counts.sum(axis=1, keepdims=True)
        mean_x, mean_y = shares @ x.T, (shares @ y)[:, None]
        covariance = shares @ (x * y).T - mean_x * mean_y
        variances = (shares @ (x * x).T - mean_x**2) * ((shares @ (y * y))[:, None] - mean_y**2)
        scale = np.sqrt(np.maximum(variances, 0))
        found: Array = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
        return found

    return correlation


def compare(
    first: Metric,
    second: Metric,
    num_rows: int,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed_noise: SeedNoise | None = None,
) -> Comparison:
    """The difference of ``second`` and ``first``, whose seeds correspond to each other; the same for the same input.

    ``seed_noise`` replaces what the seeds of these two say of it, e.g. by an estimate from more settings.
    Raises ValueError if the two do not have the same number of seeds.
    """
    observed = _difference(first, second, np.ones((1, num_rows)))[0]
    random = np.random.default_rng(0)
    draws = _resampled_rows(first, second, num_rows, resamples, random).mean(axis=1)
    noise = seed_noise or _noise_of(observed)
    if noise is not None:
        standard_error = noise.deviation / np.sqrt(len(observed))
        draws = draws + standard_error * random.standard_t(noise.degrees, size=resamples)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min(np.mean(draws <= 0), np.mean(draws >= 0))
    return Comparison(
        difference=float(observed.mean()),
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, max(2 * tail, 1 / resamples))),
        num_rows=num_rows,
        num_seeds=len(observed),
    )


def _difference(first: Metric, second: Metric, counts: Array) -> Array:
    of_first, of_second = first(counts), second(counts)
    if of_first.shape != of_second.shape:
        raise ValueError(f"{of_first.shape[1]} seeds of one setting, {of_second.shape[1]} of the other")
    return of_second - of_first


def _resampled_rows(first: Metric, second: Metric, num_rows: int, resamples: int, random: Any) -> Array:
    """Differences, [resamples, seeds]."""
    equal = np.full(num_rows, 1 / num_rows)
    step = max(1, _ENTRIES // num_rows)
    parts = []
    for start in range(0, resamples, step):
        counts = random.multinomial(num_rows, equal, size=min(step, resamples - start)).astype(float)
        parts.append(_difference(first, second, counts))
    return np.concatenate(parts)


def _noise_of(differences: Array) -> SeedNoise | None:
    """What the seeds themselves say of it; one seed says nothing."""
    if len(differences) < 2:
        return None
    return SeedNoise(float(differences.std(ddof=1)), len(differences) - 1)
