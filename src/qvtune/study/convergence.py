"""Loss against steps for each lambda, and the steps and seconds that it takes to a given loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qvtune.report.page import Table, Value
from qvtune.study.results import Curve, Result, at_best, by_ratio, families_of, spread, tasks_of
from qvtune.study.tables import Family, Rows, family_columns, family_values, marks, shown

_FEW = 4  # evaluations of a run: fewer make no curve
_BINS = 30  # of the training losses, each the mean over its steps


@dataclass(frozen=True)
class Line:
    """The runs of one lambda at its best learning rate: losses [seeds, steps] of the same kind."""

    task: str
    family: Family
    ratio: float
    rate: float
    kind: str  # evaluation, or training
    steps: list[int]
    losses: np.ndarray
    seconds: np.ndarray


def lines(results: Sequence[Result]) -> list[Line]:
    """Of all families that have several lambdas; evaluation losses, or binned training losses where a run of the task
    has been evaluated less than four times."""
    found = []
    for task, of_task in tasks_of(results).items():
        done = [one for one in of_task if one.state == "done"]
        kind = "evaluation" if done and min(len(one.evaluations.steps) for one in done) >= _FEW else "training"
        for family, of_family in families_of(of_task).items():
            ratios = {ratio: best for ratio, ones in by_ratio(of_family).items() if (best := at_best(ones))}
            if len(ratios) > 1:
                found += [_line(task, family, ratio, best, kind) for ratio, best in ratios.items()]
    return found


def _line(task: str, family: Family, ratio: float, found: Sequence[Result], kind: str) -> Line:
    curves = [one.evaluations if kind == "evaluation" else _binned(one.training) for one in found]
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    at = [[curve.steps.index(step) for step in steps] for curve in curves]
    losses = np.array([[curve.losses[i] for i in places] for curve, places in zip(curves, at, strict=True)])
    seconds = np.array([[curve.seconds[i] for i in places] for curve, places in zip(curves, at, strict=True)])
    return Line(task, family, ratio, found[0].eta_qk, kind, steps, losses, seconds)


def _binned(curve: Curve) -> Curve:
    """Means over consecutive steps, each placed at its last step."""
    edges = np.unique(np.linspace(0, len(curve.steps), _BINS + 1).round().astype(int))
    pairs = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    losses = [float(np.mean(curve.losses[first:last])) for first, last in pairs]
    return Curve([curve.steps[last - 1] for _, last in pairs], losses, [curve.seconds[last - 1] for _, last in pairs])


def speed_table(
    results: Sequence[Result], found: Sequence[Line], targets: Mapping[str, float]
) -> tuple[Table, Rows] | None:
    """Steps and seconds of training until the loss is for the first time at most a target.

    ``targets``: of tasks; of others it is what lambda = 1 ends with (mean over seeds). None without lines.
    """
    columns, rows = family_columns(results), []
    table_rows: list[list[str | Value]] = []
    groups: dict[tuple[str, Family], list[Line]] = {}
    for line in found:
        groups.setdefault((line.task, line.family), []).append(line)
    for (task, family), of_group in groups.items():
        ones = next((line for line in of_group if line.ratio == 1), None)
        if task not in targets and ones is None:
            continue
        target = targets[task] if task in targets else float(ones.losses[:, -1].mean())  # type: ignore[union-attr]
        reached = [_reached(line, target) for line in of_group]
        means = [spread(steps for steps, _ in pairs) for pairs in reached]
        complete = [math.nan if one.count < len(pairs) else one.mean for one, pairs in zip(means, reached, strict=True)]
        marked = marks(complete, higher_is_better=False)
        for line, pairs, steps, mark in zip(of_group, reached, means, marked, strict=True):
            seconds = spread(pair[1] for pair in pairs)
            label = [task, *family_values(family, columns), f"{line.ratio:g}", f"{line.rate:g}"]
            row: list[str | Value] = [*label, f"{line.kind} loss {target:.4f}", f"{steps.count} of {len(pairs)}"]
            row += [Value(_number(steps.mean, steps.deviation), "", mark), _number(seconds.mean, seconds.deviation)]
            final = spread(line.losses[:, -1])
            table_rows.append([*row, shown("loss", final)])
            rows.append(
                {"task": task, **dict(family), "ratio": line.ratio, "learning_rate": line.rate, "loss_of": line.kind}
                | {"target": target, "seeds": len(pairs), "reached": steps.count, "final_loss": final.mean}
                | {"steps": steps.mean, "steps_sd": steps.deviation}
                | {"seconds": seconds.mean, "seconds_sd": seconds.deviation}
            )
    if not table_rows:
        return None
    headings = ["task", *columns, "lambda", "eta_QK"]
    values = ["target", "seeds that reach it", "steps", "seconds of training", "final loss"]
    return Table("Steps and seconds to a given loss", [*headings, *values], table_rows, num_labels=len(headings)), rows


def _reached(line: Line, target: float) -> list[tuple[float, float]]:
    """Step and seconds of each seed's first loss that is at most ``target``; NaN where there is none."""
    found = []
    for losses, seconds in zip(line.losses, line.seconds, strict=True):
        index = np.flatnonzero(losses <= target)
        found.append((float(line.steps[index[0]]), float(seconds[index[0]])) if len(index) else (math.nan, math.nan))
    return found


def _number(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:,.0f}" if math.isnan(deviation) else f"{mean:,.0f} ± {deviation:,.0f}"


def line_rows(found: Sequence[Line]) -> Rows:
    """Every point of every line, for a CSV file."""
    return [
        {"task": line.task, **dict(line.family), "ratio": line.ratio, "learning_rate": line.rate, "loss_of": line.kind}
        | {"step": step, "mean": one.mean, "standard_deviation": one.deviation, "seeds": one.count}
        for line in found
        for step, one in zip(line.steps, map(spread, line.losses.T), strict=True)
    ]
