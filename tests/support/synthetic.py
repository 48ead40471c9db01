"""A loss over (eta_QK, eta_V) with a known optimum, and noise as of real runs: rows, seeds, and seeds on rows."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qvtune.study.search import Outcome, Rates, Search, Trial
from qvtune.study.verdict import Verdict, next_cells

ROWS = 300


@dataclass(frozen=True)
class Landscape:
    """loss = floor + a parabola around (qk, v) on the logarithm of the rates, flat beyond ``cap``, and noise.

    ``curve_qk``, ``curve_v``: nats per squared octave. ``drift``: octaves by which both optima move for each halving of
    the length. ``seed_noise``: standard deviation over seeds, nats. ``number``: of the draw of all noise.
    """

    qk: float
    v: float
    curve_qk: float = 0.01
    curve_v: float = 0.02
    floor: float = 1.0
    drift: float = 0.2
    seed_noise: float = 0.005
    row_noise: float = 0.1
    number: int = 0

    def truth(self, rates: Rates, shortened: float = 0.0) -> float:
        """Expected loss of a run, whose length was halved ``shortened`` times."""
        away = [
            math.log2(rate / best) - self.drift * shortened for rate, best in ((rates.qk, self.qk), (rates.v, self.v))
        ]
        height = self.curve_qk * away[0] ** 2 + self.curve_v * away[1] ** 2
        return self.floor + 0.1 * shortened + 0.6 * (1 - math.exp(-height / 0.6))

    def best_equal(self) -> Rates:
        """The best rate with lambda = 1."""
        share = self.curve_qk / (self.curve_qk + self.curve_v)
        eta = 2 ** (share * math.log2(self.qk) + (1 - share) * math.log2(self.v))
        return Rates(eta, eta)

    def run(self, trial: Trial, full: int) -> Outcome:
        """Losses of the rows: a hard row is hard in all runs; a seed moves all rows, and each of them a little."""
        difficulty = np.random.default_rng(self.number).gamma(2.0, 0.5, size=ROWS)
        entropy = [self.number, trial.seed, trial.steps, *(round(1e9 * rate) for rate in trial.rates)]
        random = np.random.default_rng(entropy)
        own = np.random.default_rng([self.number, trial.seed, 77]).normal(0, self.seed_noise)  # of all its runs
        noise = own + random.normal(0, self.seed_noise) + random.normal(0, self.row_noise, size=ROWS)
        expected = self.truth(trial.rates, math.log2(full / trial.steps))
        return Outcome(difficulty - 1 + expected + noise, np.ones(ROWS))


# What the searches below have to find.
KINDS = {
    "lambda 8 is better": Landscape(qk=2e-4, v=1.6e-3),
    "eta_QK does not matter": Landscape(qk=4e-4, v=4e-4, curve_qk=0.0),
    "lambda 1 is best": Landscape(qk=4e-4, v=4e-4),
    "lambda 1 is much better": Landscape(qk=4e-4, v=4e-4, curve_qk=0.06, curve_v=0.12),
}


def search_of(**changes: Any) -> Search:
    """From recipes with lambda = 4; the budget is that of 26 full runs."""
    return replace(Search(Rates(2e-4, 8e-4), 2e-4 / 8, 8e-4 * 8, steps=800, most_seeds=7), **changes)


def search_all(search: Search, landscape: Landscape) -> tuple[Verdict, dict[str, Outcome]]:
    """Run everything that the search asks for."""
    results: dict[str, Outcome] = {}
    while True:
        found = next_cells(search, results)
        if isinstance(found, Verdict):
            return found, results
        assert found and not {trial.name for trial in found} & results.keys()
        results |= {trial.name: landscape.run(trial, search.steps) for trial in found}
