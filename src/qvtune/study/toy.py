"""Theorem 2 of arXiv 2410.02247 by simulation: which rates keep feature learning efficient as the width n grows.

The paper's own toy model could not be read. This is a reconstruction from its statement and from LoRA+ (arXiv
2402.12354), whose toy model has the same three deltas: f(x) = b a^T x with a of n numbers, b a number, ||x||^2 =
Theta(n), squared loss (f - y)^2 / 2 on one example. a stands for W_q and W_k, b for W_v. a starts at N(0, 1/n), b at
0, as LoRA's factors do. With c = a^T x, a step changes f by -delta_1 - delta_2 + delta_3:

    delta_1 = -b dc    delta_2 = -c db    delta_3 = db dc

where dc and db are the step's changes of c and b. Gradient descent has delta_1 = eta_a b^2 ||x||^2 (f - y), delta_2 =
eta_b c^2 (f - y), and delta_3 = eta_a eta_b b c ||x||^2 (f - y)^2. The theorem: all are Theta(1) for all steps t > 1
if eta_a = Theta(1/n) and eta_b = Theta(1).

The gradient of a is a multiple of x. So gradient descent moves c by a multiple of ||x||^2, and Adam (with eps = 0) by a
multiple of ||x||_1: the vectors are drawn, three numbers of each are kept, and the trajectory is that of the whole
vectors. tests/study/test_toy.py compares it with torch's optimizers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Optimizer = Literal["sgd", "adam"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam")

WIDTHS = tuple(2**power for power in range(6, 15))
EXPONENTS_A = tuple(np.arange(-2.0, 0.01, 0.25))  # of eta_QK
EXPONENTS_B = tuple(np.arange(-1.0, 1.01, 0.25))  # of eta_V
THEOREM = (-1.0, 0.0)  # exponents of eta_QK and eta_V
STEPS = 10
TOLERANCE = 0.1  # around 0, of the exponent of what is called Theta(1)

_RATE = 0.1  # eta = _RATE * n^exponent; the target y is 1
_BETAS = (0.9, 0.999)
_SMALLEST, _LARGEST = 1e-300, 1e300  # a delta beyond, or nan, of a diverging run counts as these
_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Draws:
    """Of [widths, seeds] examples: a^T x at the start, ||x||^2 and ||x||_1."""

    product: Array
    squared_norm: Array
    absolute_norm: Array


@dataclass(frozen=True)
class Exponent:
    """|delta_``delta``| in step ``step`` grows as n^``slope``; [low, high] is the 95 % interval of the fit."""

    optimizer: Optimizer
    exponent_a: float
    exponent_b: float
    delta: int
    step: int
    slope: float
    low: float
    high: float

    @property
    def is_constant(self) -> bool:
        """The whole interval is near zero: the delta is Theta(1)."""
        return self.low >= -TOLERANCE and self.high <= TOLERANCE

    @property
    def is_not_constant(self) -> bool:
        """The whole interval is away from zero. An exponent can be neither, if the interval is wide."""
        return self.low > TOLERANCE or self.high < -TOLERANCE


def draw(widths: Sequence[int], seeds: int) -> Draws:
    """Examples x of n standard normal numbers and vectors a, for each width and seed."""
    random = np.random.default_rng(0)
    found = np.empty((3, len(widths), seeds))
    for place, width in enumerate(widths):
        for seed in range(seeds):
            x, a = random.standard_normal((2, width))
            found[:, place, seed] = a @ x / np.sqrt(width), x @ x, np.abs(x).sum()
    return Draws(*found)


def exponents(
    optimizer: Optimizer,
    seeds: int,
    widths: Sequence[int] = WIDTHS,
    exponents_a: Sequence[float] = EXPONENTS_A,
    exponents_b: Sequence[float] = EXPONENTS_B,
) -> list[Exponent]:
    """The scaling exponent of each delta in each step from the second on, for each pair of exponents of the rates."""
    width = np.array(widths, dtype=float)[:, None]
    rates_a = _RATE * width ** np.array(exponents_a)[:, None, None, None]  # [A, 1, widths, 1]
    rates_b = _RATE * width ** np.array(exponents_b)[:, None, None]  # [B, widths, 1]
    found = []
    for step, deltas in enumerate(simulate(optimizer, draw(widths, seeds), rates_a, rates_b), start=1):
        if step == 1:
            continue  # b is 0: two of the deltas are
        for number, values in enumerate(deltas, start=1):
            slopes, errors = _fit(np.log2(width[:, 0]), values)
            for (row, column), slope in np.ndenumerate(slopes):
                margin = _Z * errors[row, column]
                pair = float(exponents_a[row]), float(exponents_b[column])
                interval = float(slope - margin), float(slope + margin)
                found.append(Exponent(optimizer, *pair, number, step, float(slope), *interval))
    return found


def simulate(optimizer: Optimizer, draws: Draws, rates_a: Array, rates_b: Array) -> Iterator[tuple[Array, ...]]:
    """delta_1, delta_2 and delta_3 of each step, each [A, B, widths, seeds]."""
    shape = np.broadcast_shapes(rates_a.shape, rates_b.shape, draws.product.shape)
    c, b = np.broadcast_to(draws.product, shape), np.zeros(shape)
    moments = np.zeros((4, *shape))
    with np.errstate(over="ignore", invalid="ignore"):  # of runs that diverge
        for step in range(1, STEPS + 1):
            error = b * c - 1
            gradient_a, gradient_b = b * error, c * error  # that of a is a multiple of x
            if optimizer == "sgd":
                change_c, change_b = -rates_a * draws.squared_norm * gradient_a, -rates_b * gradient_b
            else:
                change_c = -rates_a * draws.absolute_norm * _adam(gradient_a, moments[:2], step)
                change_b = -rates_b * _adam(gradient_b, moments[2:], step)
            yield -b * change_c, -c * change_b, change_b * change_c
            c, b = c + change_c, b + change_b


def _adam(gradient: Array, moments: Array, step: int) -> Array:
    """Adam's step for a rate of 1; 0 where every gradient was 0. ``moments``, [2, ...], are updated in place."""
    for place, (beta, value) in enumerate(zip(_BETAS, (gradient, gradient**2), strict=True)):
        moments[place] = beta * moments[place] + (1 - beta) * value
    mean, variance = (moment / (1 - beta**step) for moment, beta in zip(moments, _BETAS, strict=True))
    step_size: Array = np.divide(mean, np.sqrt(variance), out=np.zeros_like(mean), where=variance != 0)
    return step_size


def _fit(log_widths: Array, deltas: Array) -> tuple[Array, Array]:
    """Least squares of the median of log2 |delta| over seeds on log2 n: slopes and their standard errors, [A, B].

    The median: of a few seeds the runs diverge at any rate. Its standard error is that of order statistics.
    """
    logs = np.log2(np.clip(np.nan_to_num(np.abs(deltas), nan=_LARGEST), _SMALLEST, _LARGEST))
    margin = 0.5 / np.sqrt(logs.shape[-1])
    below, medians, above = np.quantile(logs, [0.5 - margin, 0.5, 0.5 + margin], axis=-1)
    centred = log_widths - log_widths.mean()
    spread = (centred**2).sum()
    errors = np.sqrt((centred**2 * ((above - below) / 2) ** 2).sum(axis=-1)) / spread
    return (centred * medians).sum(axis=-1) / spread, errors


def worst(found: Sequence[Exponent]) -> Exponent:
    """The exponent that is the farthest from 0."""
    return max(found, key=lambda one: abs(one.slope))
