"""Sections of a run's report: its curves, what its time was spent on, and its memory."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvtune.report.chart import Curve, bar_chart, line_chart
from qvtune.report.history import Column, History
from qvtune.report.json_lines import Entry
from qvtune.report.page import Figure, Part, Section, Table
from qvtune.report.run_record import RunRecord, duration, flattened

STEP = "optimizer step"
MAX_ROWS = 40  # of a table
_NOT_METRICS = {"event", "time", "step", "seconds", "sets"}


def section(title: str, parts: Sequence[Part | None]) -> Section:
    """With what there is."""
    return Section(title, [part for part in parts if part is not None])


def run_seconds(history: History) -> float:
    """From the first start to the last event."""
    return history.starts[-1].last_time - float(history.starts[0].begin["time"]) if history.starts else 0.0


def losses(run: RunRecord) -> Section:
    """Training and evaluation loss, and all metrics of the evaluations."""
    history = run.history
    curves = [Curve("training", history.column("step"), history.column("loss"))]
    curves += [Curve(f"evaluation{name}", *points) for name, points in evaluation_losses(history).items()]
    caption = "Loss. Where a line has many points it is their mean, and the area goes from the least to the largest."
    figure = line_chart("loss", caption, curves, STEP, "nats per label token")
    return section("Loss", [figure, _other_metrics(history), _evaluations(history)])


def evaluation_losses(history: History) -> dict[str, tuple[list[float], list[float]]]:
    """Name of an evaluation set, with a space before it, or empty -> steps and losses."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for entry in history.of("eval"):
        for name, metrics in entry.get("sets", {"": entry}).items():
            steps, values = found.setdefault(f" {name}" if name else "", ([], []))
            steps.append(entry["step"])
            values.append(metrics["loss"])
    return found


def _metrics_of(entry: Entry) -> dict[str, float]:
    if "sets" in entry:
        return {name: value for name, value in flattened(entry["sets"]).items() if isinstance(value, int | float)}
    if entry["event"] == "generation":
        return {"exact_match": entry["exact_match"]} if "exact_match" in entry else {}
    return {name: value for name, value in entry.items() if name not in _NOT_METRICS}


def _other_metrics(history: History) -> Figure | None:
    """Shares and correlations over the steps."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for entry in [*history.of("eval"), *history.of("generation")]:
        for name, value in _metrics_of(entry).items():
            if name.rpartition(".")[2] not in ("loss", "perplexity"):
                steps, values = points.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    curves = [Curve(name, *found) for name, found in points.items()]
    return line_chart("metrics", "Other metrics of the evaluations.", curves, STEP, "share or correlation")


def _evaluations(history: History) -> Table | None:
    entries = history.of("eval")
    names = list(dict.fromkeys(name for entry in entries for name in _metrics_of(entry)))
    if not entries:
        return None
    shown, title = entries, "Evaluations"
    if len(entries) > MAX_ROWS:
        best = min(entries, key=lambda entry: float(entry["loss"]))
        chosen = {entry["step"]: entry for entry in [entries[0], best, *entries[2 - MAX_ROWS :]]}
        shown = [chosen[step] for step in sorted(chosen)]
        title += f": the first, that with the least loss, and the last of {len(entries)}"
    rows = [[f"{entry['step']:,}", *(_number(_metrics_of(entry).get(name)) for name in names)] for entry in shown]
    return Table(title, ["step", *names], rows)


def rates_and_norms(run: RunRecord) -> Section:
    """Learning rates, gradient norm, and how far each projection of each layer has moved."""
    history, step = run.history, run.history.column("step")
    names = [name for name in history.names() if name.startswith("lr/")]
    rates = [Curve(name.removeprefix("lr/"), step, history.column(name)) for name in names]
    clip = run.config.get("optimizer", {}).get("max_grad_norm")
    caption = "L2 norm of the gradient over all trained parameters, before clipping"
    caption += f" to {clip:g} (optimizer.max_grad_norm)." if clip is not None else "."
    norm = Curve("gradient norm", step, history.column("grad_norm"))
    parts = [
        line_chart("rates", "Learning rate of each parameter group.", rates, STEP, "learning rate"),
        line_chart("gradient", caption, [norm], STEP, "L2 norm", may_be_log=True),
        *_update_norms(history),
    ]
    return section("Learning rates and norms", parts)


def _update_norms(history: History) -> list[Figure | None]:
    saves = [entry for entry in history.of("checkpoint") if entry.get("update_norms")]
    if not saves:
        return []
    last = saves[-1]
    layers = [Curve(name, range(len(norms)), norms) for name, norms in last["update_norms"].items()]
    what = "Frobenius norm of the update, scale * B A, of each projection"
    by_layer = f"{what}, by layer, at the checkpoint of step {last['step']:,}."
    found = [line_chart("updates-layers", by_layer, layers, "layer", "norm of the update", may_be_log=True)]
    if len(saves) > 1:
        steps = [entry["step"] for entry in saves]
        means = [
            Curve(name, steps, [np.mean(entry["update_norms"].get(name, math.nan)) for entry in saves])
            for name in last["update_norms"]
        ]
        caption = f"{what}, mean over the layers, at each checkpoint."
        found.append(line_chart("updates-steps", caption, means, STEP, "mean norm of the updates"))
    return found


def speed_and_memory(run: RunRecord) -> Section:
    """Tokens per second, memory, and what the time was spent on."""
    history, step = run.history, run.history.column("step")
    speed = [Curve("tokens/s", step, tokens_per_second(history))]
    memory = [
        Curve(label, step, history.column(name) / 1e9)
        for label, name in (("process", "peak_rss_bytes"), ("device", "peak_device_bytes"))
        if np.nanmax(history.column(name), initial=0.0) > 0
    ]
    caption = "Largest memory so far of rank 0: of its process, and of what torch has allocated on its device."
    parts = [
        line_chart("speed", "Tokens per second, over all ranks.", speed, STEP, "tokens/s"),
        line_chart("memory", caption, memory, STEP, "GB"),
        _time_spent(history),
        _peaks(history),
    ]
    return section("Speed and memory", parts)


def tokens_per_second(history: History) -> Column:
    """Of each step."""
    seconds = history.column("seconds")
    rates: Column = history.column("tokens") / np.where(seconds > 0, seconds, math.nan)
    return rates


def _time_spent(history: History) -> Figure | None:
    spent: defaultdict[str, float] = defaultdict(float)
    for start in history.starts:
        recorded = sum(value for kind, value in start.seconds.items() if kind != "loading")
        for kind, value in {**start.seconds, "other": max(start.total_seconds - recorded, 0.0)}.items():
            spent[kind] += value
    spent["training"] -= history.repeated_seconds
    spent["steps run again"] = history.repeated_seconds
    total = sum(spent.values())
    found = sorted(((value, kind) for kind, value in spent.items() if value > 0), reverse=True)
    bars = [(kind, value, f"{duration(value)}, {value / total:.1%}") for value, kind in found]
    caption = "Where the time went, over all starts. Other: the check of packed rows, waiting, writing."
    return bar_chart("time", caption, bars)


def _peaks(history: History) -> Table | None:
    loads = {entry["time"]: entry for entry in history.of("base_loaded")}
    rows = []
    for number, start in enumerate(history.starts, 1):
        load = next((one for when, one in loads.items() if start.begin["time"] <= when <= start.last_time), {})
        end = start.end or {}
        sizes = [load.get(name) for name in ("base_bytes", "bytes_read", "peak_rss_bytes")]
        rows.append([str(number), *map(_size, [*sizes, end.get("peak_rss_bytes"), end.get("peak_device_bytes")])])
    columns = ["start", "base on a rank", "read", "peak while loading", "peak of the run", "peak of a device"]
    return Table("Memory of the rank that has most", columns, rows[-MAX_ROWS:]) if rows else None


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _size(value: float | None) -> str:
    if not value:
        return ""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
