"""The search of (eta_QK, eta_V): which short runs are needed next, as a function of the results so far.

Five stages, whose runs are all complete runs with their own warm-up and decay, evaluated on the same rows:

    noise    the recipe's own rates, full length, several seeds
    wide     an eighth of the length: points that fill the box, and a line of points with lambda = 1
    narrow   half the length: the best so far, and points where a Gaussian process expects better ones
    probe    full length: what the runs so far let expect as the best with lambda = 1, and as the best with another
    final    full length, several seeds: the same two, as they are expected after the probe, at most an octave lower

Settings with lambda = eta_V / eta_QK = 1 are chosen among themselves, so that what lambda brings is judged against the
best rate without it. Each stage is a function of the results of the stages before; nothing else is remembered, so a
search that was interrupted anywhere goes on as if it had not been.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qvtune.study.proposals import promising, spread
from qvtune.study.surface import Observation, fit, means

WIDE, NARROW, FULL = 8, 2, 1  # the length of a run is that of the search divided by these
SEEDS = 3  # of the first and last stage
_SPREAD, _LINE = 8, 5  # points of the wide stage in the box, and with lambda = 1
_BEST, _NEW = 2, 2  # runs of the narrow stage: the best so far and new ones, with lambda = 1 and with another
_SEARCH_SEED = 1000  # added to train.seed in the stages that choose, so that the last one is judged by other seeds
_SAME = 1.25  # lambda and 1 / lambda up to this count as 1
# In lengths of a full run; more seeds come on top.
COST = SEEDS + (_SPREAD + _LINE + 2) / WIDE + 2 * (_BEST + _NEW) / NARROW + 2 + 2 * SEEDS


class Rates(NamedTuple):
    """eta_QK and eta_V, with three significant digits."""

    qk: float
    v: float

    @property
    def ratio(self) -> float:
        """lambda."""
        return self.v / self.qk

    @property
    def are_equal(self) -> bool:
        """Whether lambda is 1, or nearly."""
        return 1 / _SAME <= self.ratio <= _SAME


@dataclass(frozen=True)
class Trial:
    """A run: its rates, its optimizer steps, its seed."""

    rates: Rates
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"qk{self.rates.qk:.2e},v{self.rates.v:.2e},steps{self.steps},seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run gave: nats of each evaluation row, and its label tokens. A run that failed has neither."""

    losses: NDArray[np.float64] | None
    tokens: NDArray[np.float64] | None = None
    failed: str | None = None

    @property
    def loss(self) -> float:
        """Nats per label token; infinite where the run failed, as one that diverges does."""
        if self.losses is None or self.tokens is None:
            return float("inf")
        return float(self.losses.sum() / self.tokens.sum())


Results = Mapping[str, Outcome]  # by the trial's name


@dataclass(frozen=True)
class Search:
    """What is searched: around ``start``, the recipe's rates, from ``low`` to ``high`` on both axes.

    ``steps``: of a full run. ``balance``: lambda at the balance point, which is tried as well; None if not measured.
    ``margin``: a difference of losses that does not matter, as a share of the loss. ``most_seeds``: that the budget
    allows in the last stage.
    """

    start: Rates
    low: float
    high: float
    steps: int
    seed: int = 0
    balance: float | None = None
    margin: float = 0.02
    most_seeds: int = SEEDS

    def trials(self, rates: Sequence[Rates], divisor: int, seeds: Sequence[int]) -> list[Trial]:
        """Runs of all ``rates`` with all ``seeds``."""
        steps = self.length(divisor)
        return [Trial(one, steps, self.seed + seed) for one in dict.fromkeys(rates) for seed in seeds]

    def length(self, divisor: int) -> int:
        """Optimizer steps of a run of a full one's length divided by ``divisor``."""
        return max(1, self.steps // divisor)

    @property
    def ends(self) -> tuple[float, float]:
        """Of both axes, as the proposals take them."""
        return self.low, self.high

    def clipped(self, qk: float, v: float) -> Rates:
        """Rounded, and within the box."""
        return Rates(*(float(f"{min(max(eta, self.low), self.high):.2e}") for eta in (qk, v)))


def stages(search: Search) -> list[Callable[[Results], list[Trial]]]:
    """The runs of each stage, given the results of the stages before."""
    return [
        lambda results: search.trials([search.start], FULL, range(SEEDS)),
        lambda results: search.trials(_wide(search), WIDE, [_SEARCH_SEED]),
        lambda results: search.trials(_narrow(search, results), NARROW, [_SEARCH_SEED]),
        lambda results: search.trials(_expected_best(search, results), FULL, [_SEARCH_SEED]),
        lambda results: search.trials(finalists(search, results), FULL, range(SEEDS)),
    ]


def next_trials(search: Search, results: Results) -> list[Trial]:
    """Runs of the first stage that is not complete, without those that are; empty after the last stage."""
    for stage in stages(search):
        missing = [trial for trial in stage(results) if trial.name not in results]
        if missing:
            return missing
    return []


def _wide(search: Search) -> list[Rates]:
    points = [search.clipped(*point) for point in spread((search.ends, search.ends), _SPREAD, search.seed)]
    places = (np.arange(_LINE) + 0.5) / _LINE
    line = [search.clipped(eta, eta) for eta in search.low * (search.high / search.low) ** places]
    balanced = [] if search.balance is None else [search.clipped(search.start.v / search.balance, search.start.v)]
    return [search.start, *balanced, *points, *line]


def tried(search: Search, results: Results, divisor: int, *, final: bool = True) -> dict[Rates, float]:
    """Losses of all settings that were run for the length divided by ``divisor``, means over seeds.

    Infinite where a run failed. Without ``final``, of full runs those before the last stage.
    """
    runs: dict[Rates, list[float]] = {}
    for stage in {WIDE: (1,), NARROW: (2,), FULL: (0, 3, 4) if final else (0, 3)}[divisor]:
        for trial in stages(search)[stage](results):
            runs.setdefault(trial.rates, []).append(results[trial.name].loss)
    return {rates: float(np.mean(losses)) for rates, losses in runs.items()}


def capped(found: Sequence[dict[Rates, float]]) -> list[dict[Rates, float]]:
    """Losses of several lengths, none far above the best of its length, which would flatten what a model sees.

    How far is the same for all: a length of few runs, all of them good, does not say what is far.
    """
    finite = [[loss for loss in losses.values() if np.isfinite(loss)] for losses in found]
    spans = [float(np.median(losses)) - min(losses) for losses in finite if losses]
    far = 4 * max([1e-9, *spans])
    return [
        {rates: min(loss, min(known, default=0.0) + far) for rates, loss in losses.items()}
        for losses, known in zip(found, finite, strict=True)
    ]


def _narrow(search: Search, results: Results) -> list[Rates]:
    (losses,) = capped([tried(search, results, WIDE)])
    ranked = sorted(losses, key=lambda rates: losses[rates])
    chosen = [rates for rates in ranked if rates.are_equal][:_BEST]
    chosen += [rates for rates in ranked if not rates.are_equal][:_BEST]
    of_line = tuple(((rates.v,), loss) for rates, loss in losses.items() if rates.are_equal)
    of_box = tuple(((rates.qk, rates.v), loss) for rates, loss in losses.items())
    chosen += [search.clipped(eta, eta) for (eta,) in promising((search.ends,), of_line, _NEW, search.seed)]
    chosen += [search.clipped(*point) for point in promising((search.ends, search.ends), of_box, _NEW, search.seed)]
    return chosen


def finalists(search: Search, results: Results) -> list[Rates]:
    """The best setting with lambda = 1, and the best with another lambda, as a model of the runs before expects.

    At most an octave below the ones that were tried at full length, and not above them: the longer a run, the lower are
    its best rates (arXiv 2409.19913), and a model is not to be believed far from where it knows full runs.
    """
    model = model_of(search, results, (WIDE, NARROW, FULL), final=False)
    found = []
    for pairs, top in zip(candidates(search), _expected_best(search, results), strict=True):
        near = [pair for pair in pairs if _is_just_below(pair.qk, top.qk) and _is_just_below(pair.v, top.v)]
        found.append(search.clipped(*near[int(means(model, near).argmin())]))
    return found


def _is_just_below(rate: float, top: float) -> bool:
    """Whether it is ``top``, which is rounded, or at most an octave lower."""
    return -1.01 <= math.log2(rate / top) <= 0.01


def _expected_best(search: Search, results: Results) -> list[Rates]:
    """The same two by the runs that are shorter than full ones."""
    model = model_of(search, results, (WIDE, NARROW))
    return [search.clipped(*pairs[int(means(model, pairs).argmin())]) for pairs in candidates(search)]


def candidates(search: Search, per_axis: int = 33) -> tuple[list[Rates], list[Rates]]:
    """A grid over the box: settings with lambda = 1, more closely, and all others."""
    line, axis = (np.geomspace(*search.ends, number).tolist() for number in (4 * per_axis, per_axis))
    others = [Rates(qk, v) for qk, v in product(axis, axis)]
    return [Rates(eta, eta) for eta in line], [one for one in others if not one.are_equal]


def model_of(search: Search, results: Results, divisors: Sequence[int], *, final: bool = True) -> Any:
    """Fitted to the losses of the runs of these lengths, ``final`` as ``tried``."""
    observations: list[Observation] = []
    losses: list[float] = []
    every = capped([tried(search, results, divisor, final=final) for divisor in divisors])
    for divisor, found in zip(divisors, every, strict=True):
        observations += [(rates.qk, rates.v, math.log2(divisor)) for rates in found]
        losses += found.values()
    return fit(tuple(observations), tuple(losses))
