"""What a search of (eta_QK, eta_V) has found: a recommendation, or why there is none yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

from qvtune.errors import UserError
from qvtune.study.compare import Array, Comparison, SeedNoise, compare, mean_of
from qvtune.study.search import (
    FULL,
    NARROW,
    SEEDS,
    WIDE,
    Outcome,
    Rates,
    Results,
    Search,
    Trial,
    candidates,
    finalists,
    model_of,
    next_trials,
)
from qvtune.study.surface import means, optima

Kind = Literal["recommended", "no difference", "not decided", "edge of the box"]
_EDGE = 1.0  # octaves from an end of the box that belong to it


@dataclass(frozen=True)
class Verdict:
    """The outcome of a search.

    Attributes:
        kind: what can be said.
        rates: what to use; None where nothing is recommended yet.
        equal, other: the best settings with lambda = 1 and with another lambda.
        comparison: loss of ``other`` minus that of ``equal``, nats per label token.
        loss: of ``equal``, mean over seeds.
        margin: a smaller difference of losses is none that matters.
        more_seeds: how many more would probably decide.
        edges: which rates are at which end of the box.
        best_lambda, lambda_low, lambda_high: where the best lambda is by a model of all runs, with its 95 % interval.
    """

    kind: Kind
    rates: Rates | None
    equal: Rates
    other: Rates
    comparison: Comparison
    loss: float
    margin: float
    more_seeds: int
    edges: tuple[str, ...]
    best_lambda: float
    lambda_low: float
    lambda_high: float

    @property
    def suggested(self) -> Rates:
        """``rates``; where nothing is recommended yet the better of the two settings so far."""
        return self.rates or (self.other if self.comparison.difference < 0 else self.equal)


def next_cells(search: Search, results: Results) -> list[Trial] | Verdict:
    """The runs that are needed next, or the verdict when there are enough.

    Raises UserError naming the runs of the last stage that failed.
    """
    trials = next_trials(search, results)
    if trials:
        return trials
    seeds = SEEDS
    while True:
        verdict = judge(search, results, seeds)
        if verdict.kind != "not decided" or seeds == search.most_seeds:
            return verdict
        seeds = min(seeds + verdict.more_seeds, search.most_seeds)
        more = search.trials((verdict.equal, verdict.other), FULL, range(SEEDS, seeds))
        missing = [trial for trial in more if trial.name not in results]
        if missing:
            return missing


def judge(search: Search, results: Results, seeds: int) -> Verdict:
    """The verdict by ``seeds`` runs of each of the two finalists."""
    equal, other = finalists(search, results)
    runs = {rates: _outcomes(search, results, rates, seeds) for rates in (equal, other)}
    tokens = runs[equal][0].tokens
    assert tokens is not None
    losses = {rates: np.array([one.losses for one in outcomes]) for rates, outcomes in runs.items()}
    noise = _noise(search, results, [equal, other], seeds)
    found = compare(mean_of(losses[equal], tokens), mean_of(losses[other], tokens), len(tokens), seed_noise=noise)
    loss = float(np.mean([one.loss for one in runs[equal]]))
    return _verdict(search, results, (equal, other), found, loss, noise)


def _verdict(
    search: Search, results: Results, pair: tuple[Rates, Rates], found: Comparison, loss: float, noise: SeedNoise
) -> Verdict:
    equal, other = pair
    margin = search.margin * loss
    # Where the other lambda is worse in any case, it does not matter that it is at an end of the box.
    edges = tuple(_edges(search, results, equal) + ([] if found.low > 0 else _edges(search, results, other)))
    kind: Kind = "not decided"
    rates, more = None, 0
    if edges:
        kind = "edge of the box"
    elif found.low > 0:
        kind, rates = "recommended", equal
    elif found.low >= -margin:
        kind, rates = "no difference", equal
    elif found.high < 0:
        kind, rates = "recommended", other
    else:
        more = _more_seeds(found, margin, noise)
    lambdas = _lambda_interval(search, results)
    return Verdict(kind, rates, equal, other, found, loss, margin, more, edges, *lambdas)


def _outcomes(search: Search, results: Results, rates: Rates, seeds: int) -> list[Outcome]:
    trials = search.trials([rates], FULL, range(seeds))
    failed = [f"{trial.name}: {results[trial.name].failed}" for trial in trials if results[trial.name].losses is None]
    if failed:
        raise UserError([f"no verdict without this run, which failed: {one}" for one in failed])
    return [results[trial.name] for trial in trials]


def _noise(search: Search, results: Results, pair: Sequence[Rates], seeds: int) -> SeedNoise:
    """Of the difference of two settings over seeds: what is left of the losses after means of settings and of seeds.

    From the two settings, or with the recipe's own rates as a third one where that knows more.
    """
    start = [results[trial.name].loss for trial in search.trials([search.start], FULL, range(SEEDS))]
    own = [[one.loss for one in _outcomes(search, results, rates, seeds)] for rates in pair]
    candidates = [np.array(own)]
    if search.start not in pair and np.isfinite(start).all():
        candidates.append(np.array([start, *(losses[:SEEDS] for losses in own)]))
    losses = max(candidates, key=_degrees)
    left = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
    return SeedNoise(float(np.sqrt(2 * (left**2).sum() / _degrees(losses))), _degrees(losses))


def _degrees(losses: Array) -> int:
    settings, seeds = losses.shape
    return int((settings - 1) * (seeds - 1))


def _more_seeds(found: Comparison, margin: float, noise: SeedNoise) -> int:
    """How many more until the interval is short enough to leave out 0 or what matters, if the difference stays."""
    wanted, seeds = max(found.difference + margin, -found.difference), found.num_seeds + 1
    while float(student.ppf(0.975, seeds - 1)) * noise.deviation / math.sqrt(seeds) > wanted:
        seeds += 1
    return seeds - found.num_seeds


def _edges(search: Search, results: Results, finalist: Rates) -> list[str]:
    """At which ends of the box a finalist is, where a model of the runs expects nothing as good off that end."""
    model = model_of(search, results, (WIDE, NARROW, FULL), final=False)
    of_kind = candidates(search)[0 if finalist.are_equal else 1]
    expected = dict(zip(of_kind, means(model, of_kind), strict=True))
    found = []
    for axis, name in ((0, "eta_QK"), (1, "eta_V")):
        for end, what in ((search.low, "lowest"), (search.high, "highest")):
            inside = [loss for one, loss in expected.items() if abs(math.log2(one[axis] / end)) > _EDGE]
            is_better = min(expected.values()) < min(inside) * (1 - search.margin)
            if is_better and abs(math.log2(finalist[axis] / end)) <= _EDGE:
                setting = "eta with lambda = 1" if finalist.are_equal else name
                found.append(f"{setting} is {finalist[axis]:.3g}, and the {what} that was searched {end:.3g}")
    return list(dict.fromkeys(found))


def _lambda_interval(search: Search, results: Results) -> tuple[float, float, float]:
    """The best lambda by a model of all runs, and its 95 % interval."""
    model = model_of(search, results, (WIDE, NARROW, FULL))
    line, others = candidates(search, per_axis=17)
    everywhere = [*line[::4], *others]
    best = everywhere[int(means(model, everywhere).argmin())].ratio
    low, high = np.quantile([everywhere[place].ratio for place in optima(model, everywhere)], [0.025, 0.975])
    return best, float(low), float(high)
