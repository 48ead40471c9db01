"""Whether lambda > 1 is better than lambda = 1, each at its own best learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest

from qvtune.study.compare import Array, Comparison, Metric, compare, correlation_of, mean_of
from qvtune.study.results import Result, at_best, by_ratio, families_of, tasks_of

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class RatioTest:
    """One lambda against lambda = 1, on the same evaluation rows and with the same seeds.

    Attributes:
        metric, loss: lambda minus 1, of the task's metric and of the evaluation loss.
        adjusted, adjusted_loss: their p-values after Holm's correction for all tests of the study.
        mcnemar: seed -> (rows that only lambda = 1 has right, rows that only this lambda has right, exact p-value); of
            accuracy only.
        problem: why there is no test; the others are then None or empty.
    """

    task: str
    family: tuple[tuple[str, Any], ...]
    ratio: float
    metric_name: str
    rate: float = 0.0
    rate_of_one: float = 0.0
    higher_is_better: bool = False
    metric: Comparison | None = None
    loss: Comparison | None = None
    adjusted: float = float("nan")
    adjusted_loss: float = float("nan")
    mcnemar: tuple[tuple[int, int, int, float], ...] = ()
    problem: str = ""

    @property
    def verdict(self) -> str:
        """What the metric says, at 5 % after Holm's correction."""
        if self.metric is None:
            return self.problem
        if self.adjusted >= 1 - LEVEL or not self.metric.is_significant:
            return "no difference shown"
        return "better" if (self.metric.difference > 0) == self.higher_is_better else "worse"


def ratio_tests(results: Sequence[Result]) -> list[RatioTest]:
    """Every lambda but 1 against 1, for each task and family that has both; p-values corrected over all of them."""
    found = []
    for task, of_task in tasks_of(results).items():
        for family, of_family in families_of(of_task).items():
            ratios = by_ratio(of_family)
            if 1.0 in ratios:
                ones = at_best(ratios.pop(1.0))
                found += [_test(task, family, ratio, ones, at_best(others)) for ratio, others in ratios.items()]
    return _corrected(found)


def _test(
    task: str, family: tuple[tuple[str, Any], ...], ratio: float, ones: Sequence[Result], others: Sequence[Result]
) -> RatioTest:
    test = RatioTest(task, family, ratio, (others or ones)[0].metric if others or ones else "")
    if not ones or not others:
        return replace(test, problem=f"no cell with lambda = {ratio if ones else 1:g} is done")
    test = replace(test, rate=others[0].eta_qk, rate_of_one=ones[0].eta_qk, higher_is_better=ones[0].higher_is_better)
    seeds = sorted({one.seed for one in ones} & {one.seed for one in others})
    first, second = ([one for one in found if one.seed in seeds] for found in (ones, others))
    if problem := _problem(first, second):
        return replace(test, problem=problem)
    num_rows = len(first[0].rows["loss"])

    def compared(name: str) -> Comparison:
        metric, other = (metric_of_rows(found, name) for found in (first, second))
        return compare(metric, other, num_rows, resamples=RESAMPLES, level=LEVEL)

    return replace(
        test,
        metric=compared(ones[0].metric),
        loss=compared("loss"),
        mcnemar=tuple(map(_mcnemar, first, second)) if ones[0].metric == "accuracy" else (),
    )


def _problem(first: Sequence[Result], second: Sequence[Result]) -> str:
    if not first:
        return "no seed is done with both"
    if any(not one.rows for one in [*first, *second]):
        return "no results by row (train.eval_rows)"
    keys = [key for key in ("tokens", "label") if key in first[0].rows]
    if any(not np.array_equal(one.rows[key], first[0].rows[key]) for one in [*first, *second] for key in keys):
        return "not evaluated on the same rows"
    if first[0].metric not in ("loss", *ROW_METRICS):
        return f"{first[0].metric} cannot be computed from single rows"
    return ""


def metric_of_rows(results: Sequence[Result], name: str) -> Metric:
    """A metric of runs that differ in their seed, as a function of how often each row was drawn."""
    rows = [one.rows for one in results]
    if name == "loss":
        return mean_of([one["loss"] for one in rows], rows[0]["tokens"])
    predictions, labels = np.array([one["prediction"] for one in rows]), rows[0]["label"]
    return ROW_METRICS[name](predictions, labels)


def _accuracy(predictions: Array, labels: Array) -> Metric:
    return mean_of(predictions == labels)


def _f1(predictions: Array, labels: Array) -> Metric:
    """Of the second class where there are two, else the mean over the classes that were drawn or predicted."""
    classes = np.union1d(predictions, labels)
    chosen = [1.0] if set(classes) <= {0.0, 1.0} else classes

    def f1(counts: Array) -> Array:
        hits = np.array([counts @ ((predictions == one) & (labels == one)).T for one in chosen])
        named = np.array([counts @ ((predictions == one) * 1.0 + (labels == one)).T for one in chosen])
        of_classes = np.divide(2 * hits, named, out=np.zeros_like(named), where=named > 0)
        found: Array = of_classes.sum(axis=0) / np.maximum((named > 0).sum(axis=0), 1)
        return found

    return f1


def _matthews(predictions: Array, labels: Array) -> Metric:
    """Matthews' coefficient for any number of classes (Gorodkin, 2004): a correlation of class indicators."""
    classes = np.union1d(predictions, labels)

    def matthews(counts: Array) -> Array:
        shares = counts / counts.sum(axis=1, keepdims=True)
        said = np.array([shares @ (predictions == one).T for one in classes])  # [classes, resamples, seeds]
        true = np.array([shares @ (labels == one) for one in classes])[:, :, None]
        covariance = shares @ (predictions == labels).T - (said * true).sum(axis=0)
        scale = np.sqrt(np.maximum((1 - (said**2).sum(axis=0)) * (1 - (true**2).sum(axis=0)), 0))
        found: Array = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
        return found

    return matthews


def _spearman(predictions: Array, labels: Array) -> Metric:
    """Pearson's correlation of the ranks within the rows that were drawn."""

    def spearman(counts: Array) -> Array:
        of_labels = _ranks(counts, labels)
        found = []
        for own in predictions:
            x, y = (_centred(counts, ranks) for ranks in (_ranks(counts, own), of_labels))
            scale = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
            covariance = (counts * x * y).sum(1)
            found.append(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12))
        return np.array(found).T

    return spearman


def _centred(counts: Array, values: Array) -> Array:
    found: Array = values - (counts * values).sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    return found


def _ranks(counts: Array, values: Array) -> Array:
    """[resamples, rows]: the mean rank of each row's value among all that were drawn."""
    unique, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(unique)))
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks: Array = (np.cumsum(drawn, axis=1) - drawn / 2)[:, place]
    return ranks


ROW_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": correlation_of,
    "spearman": _spearman,
}


def _mcnemar(first: Result, second: Result) -> tuple[int, int, int, float]:
    """Seed, rows that only the first has right, rows that only the second has right, and the exact p-value."""
    right, others = (one.rows["prediction"] == one.rows["label"] for one in (first, second))
    lost, won = int((right & ~others).sum()), int((others & ~right).sum())
    return first.seed, lost, won, float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, never smaller than the one before."""
    order = np.argsort(p_values, kind="stable")
    steps = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def _corrected(found: Sequence[RatioTest]) -> list[RatioTest]:
    of_metric = iter(holm([one.metric.p_value for one in found if one.metric]))
    of_loss = iter(holm([one.loss.p_value for one in found if one.loss]))
    return [replace(one, adjusted=next(of_metric), adjusted_loss=next(of_loss)) if one.metric else one for one in found]
