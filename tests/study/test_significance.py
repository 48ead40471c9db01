"""Lambda against 1: each number against SciPy and scikit-learn, and the corrections against published ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from qvtune.study.results import Result, read_results
from qvtune.study.significance import ROW_METRICS, holm, ratio_tests
from tests.support.studies import cell, make_study, write_lines

RATES = (5e-4, 2e-3)


def by_scikit_learn(name: str) -> Callable[[Any, Any], float]:
    return {
        "accuracy": accuracy_score,
        "f1": lambda labels, said: f1_score(labels, said, average="macro", zero_division=0),
        "matthews": matthews_corrcoef,
        "pearson": lambda labels, said: np.corrcoef(labels, said)[0, 1],
        "spearman": lambda labels, said: spearmanr(labels, said).statistic,
    }[name]


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_metrics_of_drawn_rows_are_those_of_the_rows_repeated(name: str) -> None:
    """Three classes; two seeds; every row as often as it was drawn."""
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 3, 40).astype(float), rng.integers(0, 3, (2, 40)).astype(float)
    said[:, :25] = labels[:25]
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=5).astype(float)
    found = ROW_METRICS[name](said, labels)(counts)
    for drawn, values in zip(counts.astype(int), found, strict=True):
        expected = [by_scikit_learn(name)(np.repeat(labels, drawn), np.repeat(one, drawn)) for one in said]
        np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_f1_of_two_classes_is_that_of_the_second() -> None:
    rng = np.random.default_rng(1)
    labels, said = rng.integers(0, 2, 50).astype(float), rng.integers(0, 2, (1, 50)).astype(float)
    assert ROW_METRICS["f1"](said, labels)(np.ones((1, 50)))[0, 0] == pytest.approx(f1_score(labels, said[0]))


def test_holm() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm"); the example of Holm's article, at 5 %, rejects the first."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Four seeds. With qv lambda = 2 is better and 16 worse than 1; with kv all are the same. One rate is better."""
    skills = {1.0: 0.8, 2.0: 1.6, 16.0: 0.2}

    def skill(factors: Any) -> float:
        own = skills[factors["ratio"]] if factors["projections"] == "qv" else 1.0
        return own - 0.5 * (factors["learning_rate"] != (RATES[1] if factors["ratio"] < 16 else RATES[0]))

    cells = [
        cell(projections=projections, ratio=ratio, learning_rate=rate, seed=seed)
        for projections in ("qv", "kv")
        for ratio in skills
        for rate in RATES
        for seed in range(4)
    ]
    return read_results(make_study(tmp_path_factory.mktemp("study") / "s", cells, skill, num_rows=400))


def test_each_lambda_is_compared_with_1_at_the_best_rate_of_both(results: list[Result]) -> None:
    found = {(dict(one.family)["projections"], one.ratio): one for one in ratio_tests(results)}
    assert [(*key, one.rate, one.rate_of_one, one.verdict) for key, one in found.items()] == [
        ("qv", 2.0, 2e-3, 2e-3, "better"),
        ("qv", 16.0, 5e-4, 2e-3, "worse"),
        ("kv", 2.0, 2e-3, 2e-3, "no difference shown"),
        ("kv", 16.0, 5e-4, 2e-3, "no difference shown"),
    ]
    better = found["qv", 2.0]
    values = {
        ratio: [one.value() for one in results if (one.ratio, one.eta_qk) == (ratio, 2e-3)][:4] for ratio in (1, 2)
    }
    assert better.metric is not None and better.loss is not None
    assert better.metric.difference == pytest.approx(np.mean(values[2]) - np.mean(values[1]))
    assert better.metric.low < better.metric.difference < better.metric.high
    assert better.loss.difference < 0 and better.metric.num_seeds == 4


def test_mcnemar_counts_the_rows_that_one_of_the_two_has_right(results: list[Result]) -> None:
    test = ratio_tests(results)[0]
    chosen = {ratio: [one for one in results if (one.ratio, one.eta_qk) == (ratio, 2e-3)] for ratio in (1, 2)}
    assert len(test.mcnemar) == 4
    for seed, lost, won, p_value in test.mcnemar:
        first, second = (chosen[ratio][seed].rows for ratio in (1, 2))
        right = [rows["prediction"] == rows["label"] for rows in (first, second)]
        assert (lost, won) == (np.sum(right[0] > right[1]), np.sum(right[1] > right[0]))
        assert p_value == pytest.approx(binomtest(lost, lost + won, 0.5).pvalue)


def test_p_values_are_corrected_for_all_tests_together(results: list[Result]) -> None:
    tests = ratio_tests(results)
    metric, loss = ([getattr(one, name).p_value for one in tests] for name in ("metric", "loss"))
    assert [one.adjusted for one in tests] == holm(metric)
    assert [one.adjusted_loss for one in tests] == holm(loss)
    for one in tests:
        assert one.metric is not None
        if one.verdict in ("better", "worse"):
            assert one.adjusted < 0.05 and one.metric.is_significant


def test_why_there_is_no_test_is_said(tmp_path: Path) -> None:
    cells = [cell(ratio=ratio, seed=seed) for ratio in (1.0, 2.0, 4.0, 8.0) for seed in (0, 1)]
    study = make_study(tmp_path / "s", cells, num_rows=30)
    folders = {(one.factors["ratio"], one.factors["seed"]): study / "cells" / one.name for one in cells}
    for seed in (0, 1):
        (folders[2.0, seed] / "eval_rows.jsonl").unlink()
        (folders[4.0, seed] / "failed.txt").write_text("no memory")
    rows = [json.loads(line) for line in (folders[8.0, 1] / "eval_rows.jsonl").read_text().splitlines()]
    rows[-1]["label"][3] = 1 - rows[-1]["label"][3]
    write_lines(folders[8.0, 1] / "eval_rows.jsonl", rows)
    found = {one.ratio: one for one in ratio_tests(read_results(study))}
    assert "train.eval_rows" in found[2.0].verdict
    assert found[4.0].verdict == "no cell with lambda = 4 is done"
    assert found[8.0].verdict == "not evaluated on the same rows"
