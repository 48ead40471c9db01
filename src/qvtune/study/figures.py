"""The figures of a study: heat maps of both learning rates, loss against steps, importance of projections."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvtune.report.drawing import COLORS, drawing, finished
from qvtune.report.page import Figure
from qvtune.study.convergence import Line
from qvtune.study.results import Result, Spread, families_of, spread, tasks_of
from qvtune.study.tables import IMPORTANCE, Family, Rows, importance_groups, name_of, number, title

_COLUMNS = 3  # panels beside each other
_PERCENT = 100.0


class RateGrid:
    """Mean and deviation over seeds of a metric by (eta_QK, eta_V); the best cell, and those that are as good.

    A cell is as good as the best where the two means differ by at most the best one's standard deviation over seeds.
    """

    def __init__(self, results: Sequence[Result], metric: str, higher_is_better: bool) -> None:
        self.metric = metric
        points: dict[tuple[float, float], list[Result]] = {}
        for one in results:
            points.setdefault((one.eta_qk, one.eta_v), []).append(one)
        self.eta_qk = sorted({pair[0] for pair in points})
        self.eta_v = sorted({pair[1] for pair in points})
        self.equal = sorted({(one.eta_qk, one.eta_v) for one in results if one.ratio == 1})
        self.failed = {pair for pair, found in points.items() if not any(one.state == "done" for one in found)}
        found = {pair: spread(one.value(metric) for one in ones) for pair, ones in points.items()}
        self.cells: dict[tuple[float, float], Spread] = {pair: one for pair, one in found.items() if one.count}
        most = max((one.count for one in self.cells.values()), default=0)
        means = {pair: one.mean for pair, one in sorted(self.cells.items()) if one.count == most}
        choose = max if higher_is_better else min
        self.best = choose(means, key=means.__getitem__) if means else None
        self.as_good = {pair for pair, one in self.cells.items() if pair != self.best and self._is_close(one)}

    def _is_close(self, one: Spread) -> bool:
        assert self.best is not None
        best = self.cells[self.best]
        return not math.isnan(best.deviation) and abs(one.mean - best.mean) <= best.deviation

    @property
    def is_grid(self) -> bool:
        """Whether there are several rates and several lambdas."""
        return len(self.eta_qk) > 1 and set(self.cells) > {pair for pair in self.equal if pair in self.cells}


def rate_grids(results: Sequence[Result]) -> dict[str, dict[Family, list[RateGrid]]]:
    """Task -> family -> a grid of the task's metric and one of the loss, where both rates vary."""
    found: dict[str, dict[Family, list[RateGrid]]] = {}
    for task, of_task in tasks_of(results).items():
        for family, of_family in families_of(of_task).items():
            done = [one for one in of_family if one.state == "done"]
            metrics = dict.fromkeys(one.metric for one in done[:1]) | {"loss": None}
            higher = any(one.higher_is_better for one in done)
            grids = [RateGrid(of_family, metric, higher and metric != "loss") for metric in metrics]
            if any(grid.is_grid for grid in grids):
                found.setdefault(task, {})[family] = grids
    return found


def rate_rows(grids: dict[str, dict[Family, list[RateGrid]]]) -> Rows:
    """Every cell of every heat map, for a CSV file."""
    return [
        {"task": task, **dict(family), "metric": grid.metric, "eta_qk": pair[0], "eta_v": pair[1]}
        | {"mean": one.mean, "standard_deviation": one.deviation, "seeds": one.count}
        | {"best": pair == grid.best, "within_one_deviation": pair in grid.as_good}
        for task, of_task in grids.items()
        for family, of_family in of_task.items()
        for grid in of_family
        for pair, one in sorted(grid.cells.items())
    ]


def heat_maps(task: str, of_task: dict[Family, list[RateGrid]]) -> Figure:
    """One row per family: the task's metric, and the loss."""
    largest = max(len(grid.eta_v) for grids in of_task.values() for grid in grids)
    num_columns = max(map(len, of_task.values()))
    with drawing(5.2 * num_columns, (1.3 + 0.36 * largest) * len(of_task) + 0.3) as canvas:
        axes = canvas.subplots(len(of_task), num_columns, squeeze=False)
        for row, (family, grids) in zip(axes, of_task.items(), strict=True):
            for axis, grid in zip(row, grids, strict=False):
                _heat_map(canvas, axis, grid, f"{name_of(family)}: {title(grid.metric)}")
            for axis in row[len(grids) :]:
                axis.set_visible(False)
        caption = (
            f"{task}: mean over seeds for each pair of learning rates. Star: the best; ring: at most one standard "
            "deviation (over the seeds of the best) from it; cross: failed. Dotted border: lambda = 1. Empty: not in "
            "the grid."
        )
        return finished(canvas, f"rates_{_file_name(task)}", caption)


def _heat_map(canvas: Any, axis: Any, grid: RateGrid, heading: str) -> None:
    values = np.full((len(grid.eta_v), len(grid.eta_qk)), np.nan)
    for (eta_qk, eta_v), one in grid.cells.items():
        values[grid.eta_v.index(eta_v), grid.eta_qk.index(eta_qk)] = one.mean
    colours = "viridis" if grid.metric != "loss" else "viridis_r"
    scaled = values * _factor(grid.metric)
    x_edges, y_edges = _edges(grid.eta_qk), _edges(grid.eta_v)
    image = axis.pcolormesh(x_edges, y_edges, np.ma.masked_invalid(scaled), cmap=colours, edgecolors="white", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="eta_QK", ylabel="eta_V", title=heading)
    axis.grid(visible=False)
    for ticks, which, rates in ((axis.xaxis, axis.set_xticks, grid.eta_qk), (axis.yaxis, axis.set_yticks, grid.eta_v)):
        ticks.set_minor_locator(_no_ticks())
        which(rates, [f"{rate:g}" for rate in rates])
    axis.tick_params(axis="x", rotation=30 if len(grid.eta_qk) > 4 else 0)
    for pair, one in grid.cells.items():
        dark = image.norm(one.mean * _factor(grid.metric)) < 0.5
        colour = "white" if dark == (colours == "viridis") else "black"
        mark = " ★" if pair == grid.best else " ○" if pair in grid.as_good else ""
        weight = "bold" if pair == grid.best else "normal"
        axis.annotate(
            number(grid.metric, one.mean) + mark, pair, ha="center", va="center", color=colour, weight=weight, size=8
        )
    for pair in sorted(grid.failed):
        axis.annotate("×", pair, ha="center", va="center", color="#a3301c", size=12)
    for place in grid.equal:
        x, y = grid.eta_qk.index(place[0]), grid.eta_v.index(place[1])
        outline = [x_edges[x], x_edges[x + 1], x_edges[x + 1], x_edges[x], x_edges[x]]
        heights = [y_edges[y], y_edges[y], y_edges[y + 1], y_edges[y + 1], y_edges[y]]
        axis.plot(outline, heights, ":", color="black", lw=1.3)
    axis.set(xlim=(x_edges[0], x_edges[-1]), ylim=(y_edges[0], y_edges[-1]))
    canvas.colorbar(image, ax=axis, fraction=0.05, pad=0.02)


def _factor(metric: str) -> float:
    return _PERCENT if title(metric).endswith("%") else 1.0


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _edges(rates: Sequence[float]) -> list[float]:
    """Borders of the cells, halfway between neighbours on a logarithmic axis."""
    logs = np.log(rates)
    middle = (logs[1:] + logs[:-1]) / 2
    edges: list[float] = np.exp([2 * logs[0] - middle[0], *middle, 2 * logs[-1] - middle[-1]]).tolist()
    return edges


def loss_figure(task: str, found: Sequence[Line]) -> Figure:
    """One panel per family, a line with a band of one standard deviation per lambda."""
    families = list(dict.fromkeys(line.family for line in found))
    ratios = sorted({line.ratio for line in found})
    colours = _shades(len(ratios))
    rows = math.ceil(len(families) / _COLUMNS)
    columns = min(len(families), _COLUMNS)
    with drawing(max(4.2 * columns, 5.5), 3.1 * rows + 0.4) as canvas:
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis, family in zip(axes, families, strict=False):
            for line in (one for one in found if one.family == family):
                colour = colours[ratios.index(line.ratio)]
                mean, deviation = line.losses.mean(axis=0), np.array([spread(one).deviation for one in line.losses.T])
                label = f"lambda {line.ratio:g} (eta_QK {line.rate:g})"
                axis.plot(
                    line.steps, mean, color=colour, label=label, marker="o" if line.kind == "evaluation" else "", ms=3
                )
                if len(line.losses) > 1:
                    axis.fill_between(line.steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
            axis.set(title=name_of(family), xlabel="optimizer step", ylabel=f"{found[0].kind} loss")
            axis.legend(fontsize=7.5)
        for axis in axes[len(families) :]:
            axis.set_visible(False)
        caption = (
            f"{task}: {found[0].kind} loss, nats per label, for each lambda at its own best learning rate; mean over "
            "seeds and a band of one standard deviation."
        )
        return finished(canvas, f"loss_{_file_name(task)}", caption)


def _shades(number_of: int) -> list[Any]:
    """Of an ordered quantity: dark for the first."""
    from matplotlib import colormaps

    return [colormaps["plasma"](share) for share in np.linspace(0, 0.85, number_of)]


def importance_figure(results: Sequence[Result]) -> Figure | None:
    """One panel per task and size: each set of projections with lambda = 1, and with the best one."""
    panels = [
        (task, group, sets)
        for task, of_task in tasks_of(results).items()
        for group, sets in importance_groups(of_task).items()
        if any(one.state == "done" for found in sets.values() for one in found)
    ]
    if not panels:
        return None
    columns = 2 if len(panels) in (2, 4) else min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    with drawing(max(4.2 * columns, 5.5), 3.0 * rows + 0.3) as canvas:
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis, (task, group, sets) in zip(axes, panels, strict=False):
            first = next(one for found in sets.values() for one in found if one.state == "done")
            for number_of, (choice, choose) in enumerate(IMPORTANCE.items()):
                values = [spread(one.value() for one in choose(found)) for found in sets.values()]
                scale = _factor(first.metric)
                places = np.arange(len(sets)) + 0.16 * (2 * number_of - 1)
                errors = [0 if math.isnan(one.deviation) else one.deviation * scale for one in values]
                style = {"fmt": "o", "ms": 5.5, "capsize": 2.5, "lw": 1.2, "color": COLORS[number_of]}
                axis.errorbar(places, [one.mean * scale for one in values], errors, label=choice, **style)
            axis.set_xticks(range(len(sets)), list(sets))
            axis.set(title=f"{task}: {group}", ylabel=title(first.metric))
            axis.grid(visible=False, axis="x")
            axis.legend(fontsize=7.5)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        caption = "Projections, each set at its own best learning rate: mean and standard deviation over seeds."
        return finished(canvas, "importance", caption)


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)
