"""The paired bootstrap: coverage of its intervals, and its metrics against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef

from qvtune.study.compare import Comparison, SeedNoise, compare, correlation_of, mean_of

ROWS = 200


def losses(random: np.random.Generator, gain: float, *, seeds: int, seed_noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Nats of the rows of two settings, [seeds, rows] each: hard rows are hard for both, the second gains ``gain``."""
    difficulty = random.gamma(2.0, 0.5, size=ROWS)
    first = difficulty + random.normal(0, 0.05, size=(seeds, ROWS))
    gains = gain + random.normal(0, seed_noise, size=(seeds, 1)) + random.normal(0, 0.1, size=ROWS)
    return first, first - gains


@pytest.mark.parametrize(("seeds", "seed_noise"), [(1, 0.0), (3, 0.02), (5, 0.02), (3, 0.1)])
def test_the_interval_covers_the_truth(seeds: int, seed_noise: float) -> None:
    """Also with three seeds whose noise is what decides, where resampled seeds would cover about 70 %."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        first, second = losses(random, 0.03, seeds=seeds, seed_noise=seed_noise)
        found = compare(mean_of(first), mean_of(second), ROWS, resamples=400)
        covered += found.low <= -0.03 <= found.high
    assert 180 <= covered <= 200


def test_pairing_finds_what_the_noise_of_rows_would_hide() -> None:
    random = np.random.default_rng(2)
    first, second = losses(random, 0.05, seeds=3, seed_noise=0.005)
    unpaired_error = np.sqrt(first.mean(axis=0).var() / ROWS + second.mean(axis=0).var() / ROWS)
    found = compare(mean_of(first), mean_of(second), ROWS)
    assert found.is_significant and found.high < 0 and found.p_value < 0.05
    assert 1.96 * unpaired_error > abs(found.difference), "two independent samples would say nothing"
    same = compare(mean_of(first), mean_of(first), ROWS)
    assert same == Comparison(0.0, 0.0, 0.0, 1.0, ROWS, 3) and not same.is_significant


def test_an_estimate_of_the_noise_from_more_runs_replaces_that_of_two_settings() -> None:
    random = np.random.default_rng(3)
    first, second = losses(random, 0.05, seeds=3, seed_noise=0.02)
    alone = compare(mean_of(first), mean_of(second), ROWS)
    known = compare(mean_of(first), mean_of(second), ROWS, seed_noise=SeedNoise(0.02, 100))
    exact = compare(mean_of(first), mean_of(second), ROWS, seed_noise=SeedNoise(0.0, 100))
    assert exact.high - exact.low < known.high - known.low < alone.high - alone.low
    assert known.difference == alone.difference == exact.difference


def test_settings_with_other_seeds_are_not_paired() -> None:
    with pytest.raises(ValueError, match="3 seeds of one setting, 2 of the other"):
        compare(mean_of(np.zeros((3, 5))), mean_of(np.zeros((2, 5))), 5)


def test_a_mean_is_that_of_label_tokens() -> None:
    values, tokens = [[2.0, 9.0, 1.0]], [1.0, 3.0, 4.0]
    counts = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    assert mean_of(values, tokens)(counts).tolist() == [[12 / 8], [19 / 10]]


def test_correlations_are_those_of_scipy_and_scikit_learn() -> None:
    random = np.random.default_rng(4)
    labels, rows = random.normal(size=50), random.integers(0, 50, size=50)
    predictions = labels + random.normal(size=(2, 50))
    counts = np.bincount(rows, minlength=50)[None].astype(float)
    found = correlation_of(predictions, labels)(counts)[0]
    assert found == pytest.approx([pearsonr(one[rows], labels[rows]).statistic for one in predictions], rel=1e-12)

    classes, predicted = labels > 0, predictions > 0.5
    found = correlation_of(predicted, classes)(counts)[0]
    assert found == pytest.approx([matthews_corrcoef(classes[rows], one[rows]) for one in predicted], rel=1e-12)
    constant = correlation_of(np.ones((1, 50)), classes)(counts)[0, 0]
    assert constant == matthews_corrcoef(classes[rows], np.ones(50)) == 0


def test_the_result_does_not_depend_on_how_many_resamples_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = losses(np.random.default_rng(5), 0.02, seeds=2, seed_noise=0.01)
    whole = compare(mean_of(first), mean_of(second), ROWS, resamples=50)
    monkeypatch.setattr("qvtune.study.compare._ENTRIES", 7 * ROWS)
    parts = compare(mean_of(first), mean_of(second), ROWS, resamples=50)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high], rel=1e-12)
