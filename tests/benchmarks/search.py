"""How often a search of (eta_QK, eta_V) is right, on losses with a known optimum: python -m tests.benchmarks.search

For each kind of landscape and each of N simulations (default 200) with its own noise and its own place of the optimum:
the verdict, whether its interval of the difference holds the true difference of the two settings, whether its interval
of lambda holds the true best lambda, and how much worse than the best possible the recommended setting is.
"""

import math
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np

from qvtune.console import console
from tests.support.synthetic import KINDS, search_all, search_of


def simulate(kind: str, simulations: int) -> str:
    """One line of results."""
    verdicts: Counter[str] = Counter()
    difference, ratio, regrets, runs, started = 0, 0, [], [], time.process_time()
    for number in range(simulations):
        shift = 2 ** np.random.default_rng(number).uniform(-1, 1)
        template = KINDS[kind]
        landscape = replace(template, qk=template.qk * shift, v=template.v * shift, number=number)
        found, results = search_all(search_of(), landscape)
        verdicts[found.kind + (" (lambda = 1)" if found.rates == found.equal else "")] += 1
        truth = landscape.truth(found.other) - landscape.truth(found.equal)
        difference += found.comparison.low <= truth <= found.comparison.high
        ratio += found.lambda_low <= landscape.v / landscape.qk <= found.lambda_high
        runs.append(len(results))
        if found.rates is not None:
            regrets.append(landscape.truth(found.rates) / landscape.floor - 1)
    shares = [f"{share / simulations:.1%} {verdict}" for verdict, share in verdicts.most_common()]
    seconds = (time.process_time() - started) / simulations
    return "; ".join(
        [
            f"{kind}: {', '.join(shares)}",
            f"intervals hold the true difference in {difference / simulations:.1%}, the best lambda in "
            f"{ratio / simulations:.1%}",
            f"loss above the least: mean {np.mean(regrets):.2%}, in 95 % below {np.quantile(regrets, 0.95):.2%}",
            f"{np.mean(runs):.1f} runs, {seconds:.2f} s of CPU a simulation",
        ]
    )


def main() -> None:
    """Simulate each kind of landscape."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    search = search_of()
    console().print(
        f"{simulations} simulations each; box of {math.log2(search.high / search.low):.0f} octaves a side, margin "
        f"{search.margin:.0%}, up to {search.most_seeds} seeds"
    )
    for kind in KINDS:
        console().print(simulate(kind, simulations), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
