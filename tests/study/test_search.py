"""The search of (eta_QK, eta_V) on losses with a known optimum. All 200: python -m tests.benchmarks.search"""

import math
from dataclasses import replace

import numpy as np
import pytest

from qvtune.errors import UserError
from qvtune.study.proposals import promising, spread
from qvtune.study.search import COST, FULL, NARROW, SEEDS, WIDE, Outcome, Rates, Trial, capped, next_trials, stages
from qvtune.study.surface import fit, means, optima
from qvtune.study.verdict import Verdict, next_cells
from tests.support.synthetic import KINDS, Landscape, search_all, search_of

SIMULATIONS = 3


def verdicts(kind: str) -> list[tuple[Verdict, Landscape]]:
    found = []
    for number in range(SIMULATIONS):
        landscape = replace(KINDS[kind], number=number)
        found.append((search_all(search_of(), landscape)[0], landscape))
    return found


def test_a_better_lambda_is_recommended() -> None:
    for verdict, landscape in verdicts("lambda 8 is better"):
        assert verdict.kind == "recommended" and verdict.rates == verdict.other
        assert verdict.comparison.high < 0, "better than lambda = 1 at its own best rate"
        assert landscape.truth(verdict.other) < landscape.truth(landscape.best_equal()) - 0.02
        assert abs(math.log2(verdict.equal.v / landscape.best_equal().v)) < 1, "which was looked for as well"
        assert verdict.lambda_low <= 8 <= verdict.lambda_high


@pytest.mark.parametrize("kind", ["eta_QK does not matter", "lambda 1 is best", "lambda 1 is much better"])
def test_where_no_other_lambda_is_better_1_is_answered(kind: str) -> None:
    found = verdicts(kind)
    for verdict, landscape in found:
        assert verdict.rates in (None, verdict.equal) and verdict.equal.ratio == 1
        assert landscape.truth(verdict.equal) < 1.02
        truth = landscape.truth(verdict.other) - landscape.truth(verdict.equal)
        assert verdict.comparison.low <= truth <= verdict.comparison.high
    assert sum(verdict.kind == "no difference" or verdict.rates is not None for verdict, _ in found) >= SIMULATIONS - 1


def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been() -> None:
    """Whatever results there are: only the missing runs are asked for, and the verdict is the same."""
    search, landscape = search_of(), KINDS["lambda 8 is better"]
    verdict, results = search_all(search, landscape)
    names, random = list(results), np.random.default_rng(0)
    for kept in (0, 2, SEEDS, 10, 20, len(names) - 1):
        left = dict(list(results.items())[:kept])
        again = next_cells(search, left)
        assert isinstance(again, list) and {trial.name for trial in again} <= set(names[kept:])
    for _ in range(3):  # any part of a stage, in any order
        left = {name: results[name] for name in random.permutation(names[:-1])}
        del left[names[-2]]
        while not isinstance(again := next_cells(search, left), Verdict):
            left |= {trial.name: landscape.run(trial, search.steps) for trial in again}
        assert again == verdict


def test_the_stages_cost_what_is_said() -> None:
    search = search_of()
    _, results = search_all(search, KINDS["lambda 8 is better"])
    steps = [[trial.steps / search.steps for trial in stage(results)] for stage in stages(search)]
    assert sum(map(sum, steps)) <= COST
    assert [set(one) for one in steps] == [{1 / FULL}, {1 / WIDE}, {1 / NARROW}, {1 / FULL}, {1 / FULL}]
    wide = [trial.rates for trial in stages(search)[1](results)]
    assert sum(rates.are_equal for rates in wide) >= 5, "lambda = 1 has points of its own"
    assert search.start in wide
    balanced = replace(search, balance=16.0)
    assert Rates(5e-5, 8e-4) in {trial.rates for trial in stages(balanced)[1](results)}


def test_full_runs_correct_what_shorter_runs_prefer() -> None:
    """Shorter runs have their optimum at four times the rates, and do not show that it moves."""
    search, full = search_of(), replace(KINDS["lambda 1 is best"], drift=0.0)
    short = replace(full, qk=4 * full.qk, v=4 * full.v)
    results: dict[str, Outcome] = {}
    while not isinstance(found := next_cells(search, results), Verdict):
        trials = {trial.name: (full if trial.steps == search.steps else short, trial) for trial in found}
        results |= {name: landscape.run(trial, search.steps) for name, (landscape, trial) in trials.items()}
    probed = [trial.rates for trial in stages(search)[3](results)]
    assert all(abs(math.log2(rates.v / short.v)) < 0.7 for rates in probed)
    assert full.truth(found.equal) < full.truth(probed[0]) - 0.02


def test_a_model_is_not_believed_far_from_full_runs() -> None:
    """Full runs learn ten times as much, the more the higher the rate is: nothing says where that ends.

    As on SST-2, where 80 steps had learned and 40 had not. The half runs' best is kept, or lower rates.
    """
    search, results = search_of(), {}
    landscape = replace(KINDS["lambda 1 is best"], curve_qk=0.002, curve_v=0.004)

    def run(trial: Trial) -> Outcome:
        outcome = landscape.run(trial, search.steps)
        assert outcome.losses is not None
        learned = 0.2 * math.log2(trial.rates.qk * trial.rates.v / search.low**2) * (trial.steps == search.steps)
        return replace(outcome, losses=outcome.losses - learned)

    while not isinstance(found := next_cells(search, results), Verdict):
        results |= {trial.name: run(trial) for trial in found}
    for finalist, probed in zip((found.equal, found.other), stages(search)[3](results), strict=True):
        assert finalist.qk <= probed.rates.qk and finalist.v <= probed.rates.v


def test_what_is_far_is_the_same_for_all_lengths() -> None:
    """Of three full runs the two best are as good as each other; the third one must not count as nearly as good."""
    one, two, far, failed = (Rates(eta, eta) for eta in (1e-4, 2e-4, 3e-4, 4e-4))
    short, full = capped([{one: 1.0, two: 1.5, far: 9.0}, {one: 0.5, two: 0.5, far: 2.0, failed: math.inf}])
    assert short == {one: 1.0, two: 1.5, far: 3.0}
    assert full == {one: 0.5, two: 0.5, far: 2.0, failed: 2.5}
    assert math.isfinite(capped([{failed: math.inf}])[0][failed]), "a model needs numbers, also where all have failed"


def test_what_is_not_decided_asks_for_seeds_and_uses_them() -> None:
    """The noise of seeds is larger than what lambda brings."""
    landscape = replace(KINDS["lambda 8 is better"], seed_noise=0.03, number=2)
    few, results = search_all(search_of(most_seeds=SEEDS), landscape)
    assert few.kind == "not decided" and few.rates is None and few.more_seeds > 1
    assert few.comparison.low < -few.margin and few.comparison.high > 0 and few.comparison.num_seeds == SEEDS
    many, more = search_all(search_of(most_seeds=SEEDS + few.more_seeds), landscape)
    assert many.comparison.num_seeds == SEEDS + few.more_seeds
    assert len(more) == len(results) + 2 * few.more_seeds
    assert many.comparison.high - many.comparison.low < few.comparison.high - few.comparison.low
    some, _ = search_all(search_of(most_seeds=SEEDS + 1), landscape)
    assert some.comparison.num_seeds == SEEDS + 1, "what the budget has is used, even if it may not be enough"


def test_an_optimum_outside_of_the_box_is_said_to_be_there() -> None:
    search = search_of(start=Rates(5e-5, 1e-4), low=2e-5, high=2e-4)
    verdict, _ = search_all(search, KINDS["lambda 8 is better"])
    assert verdict.kind == "edge of the box" and verdict.rates is None
    assert any(
        edge.startswith("eta_V is ") and edge.endswith("the highest that was searched 0.0002") for edge in verdict.edges
    )


def test_runs_that_diverge_are_results_and_those_of_the_last_stage_are_needed() -> None:
    search, landscape = search_of(), replace(KINDS["lambda 1 is best"], number=2)

    def run(trial: Trial) -> Outcome:
        too_high = trial.rates.v > 3e-3 or trial.rates.qk > 3e-3
        return Outcome(None, failed="the loss is nan") if too_high else landscape.run(trial, search.steps)

    results: dict[str, Outcome] = {}
    while not isinstance(found := next_cells(search, results), Verdict):
        results |= {trial.name: run(trial) for trial in found}
    assert any(one.failed for one in results.values()) and found.rates == found.equal
    final = search.trials([found.other], FULL, range(SEEDS))
    broken = results | {trial.name: Outcome(None, failed="the disk is full") for trial in final[1:]}
    assert next_trials(search, broken) == []
    with pytest.raises(UserError) as caught:
        next_cells(search, broken)
    assert len(caught.value.problems) == SEEDS - 1 and "which failed: " in caught.value.problems[0]
    assert "the disk is full" in caught.value.problems[0]


def test_proposals_are_in_the_box_and_the_same_every_time(capfd: pytest.CaptureFixture[str]) -> None:
    box = ((1e-5, 1e-2), (1e-4, 1e-3))
    points = spread(box, 8, seed=1)
    assert len(set(points)) == 8
    tried = tuple((point, math.log2(point[0] / 1e-3) ** 2) for point in points)
    new = promising(box, tried, 3, seed=1)
    assert len(set(new)) == 3
    assert all(low <= value <= high for point in points + new for value, (low, high) in zip(point, box, strict=True))
    spread.cache_clear()
    promising.cache_clear()
    assert spread(box, 8, seed=1) == points and promising(box, tried, 3, seed=1) == new
    assert capfd.readouterr() == ("", ""), "nothing of Optuna's"


def test_the_model_smooths_noise_and_carries_the_optimum_to_the_full_length() -> None:
    random = np.random.default_rng(0)
    observations, losses = [], []
    for halvings in (3.0, 1.0):
        for qk in np.geomspace(1e-5, 1e-2, 9):
            observations.append((float(qk), 1e-3, halvings))
            away = math.log2(qk / 3e-4) - 0.3 * halvings  # the optimum of shorter runs is higher
            losses.append(1 + 0.02 * away**2 + random.normal(0, 0.005))
    model = fit(tuple(observations), tuple(losses))
    pairs = [(float(qk), 1e-3) for qk in np.geomspace(1e-5, 1e-2, 201)]
    assert abs(math.log2(pairs[int(means(model, pairs).argmin())][0] / 3e-4)) < 0.5
    inside = [abs(math.log2(pairs[place][0] / 3e-4)) < 2 for place in optima(model, pairs, draws=100)]
    assert np.mean(inside) > 0.9
