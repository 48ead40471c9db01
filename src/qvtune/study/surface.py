"""A model of the loss over eta_QK, eta_V and the length of the run, from all runs of a search.

A Gaussian process (Matern 5/2, a length scale for each of the three, noise fitted) by scikit-learn. It smooths the
noise of single runs, and carries over to the full length how the optimum moves from the short runs to the longer ones.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from qvtune.study.compare import Array

# eta_QK, eta_V, how often the length of the run was halved
Observation = tuple[float, float, float]


@cache
def fit(observations: tuple[Observation, ...], losses: tuple[float, ...]) -> Any:
    """A fitted scikit-learn regressor on ``coordinates``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    # Length scales in octaves of a rate and halvings of the length: from about one to far more than a box has.
    scales = Matern([3.0, 3.0, 6.0], [(1.0, 100.0), (1.0, 100.0), (3.0, 100.0)], nu=2.5)
    kernel = ConstantKernel(1.0, (0.05, 100.0)) * scales + WhiteKernel(0.01, (1e-5, 0.3))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a scale at the end of its range
        return model.fit(coordinates(observations), losses)


def coordinates(observations: Sequence[Observation]) -> Array:
    """[points, 3]: octaves of both rates, halvings of the length."""
    values = np.array(observations, dtype=float)
    return np.column_stack([np.log2(values[:, :2]), values[:, 2]])


def means(model: Any, pairs: Sequence[tuple[float, float]]) -> Array:
    """Expected losses at the full length of pairs of eta_QK and eta_V."""
    expected: Array = model.predict(coordinates([(qk, v, 0.0) for qk, v in pairs]))
    return expected


def optima(model: Any, pairs: Sequence[tuple[float, float]], draws: int = 400) -> list[int]:
    """Which of ``pairs`` has the least loss, in each of ``draws`` surfaces that the observations allow."""
    expected, covariance = model.predict(coordinates([(qk, v, 0.0) for qk, v in pairs]), return_cov=True)
    factor = np.linalg.cholesky(covariance + 1e-8 * covariance.trace() / len(pairs) * np.eye(len(pairs)))
    surfaces = expected + np.random.default_rng(0).standard_normal((draws, len(pairs))) @ factor.T
    return [int(place) for place in surfaces.argmin(axis=1)]
