"""Several runs on one page: their curves on common axes, their results, and the settings in which they differ."""

import math
from collections.abc import Sequence
from typing import Any

from qvtune.report.chart import Curve, line_chart
from qvtune.report.page import Page, Part, Table, Value
from qvtune.report.run_record import RunRecord, duration, flattened
from qvtune.report.run_sections import STEP, evaluation_losses, run_seconds, section, tokens_per_second

_Named = Sequence[tuple[str, RunRecord]]
_UNIT = "nats per label token"
_RESULTS = (
    *("run", "steps", "first evaluation", "least evaluation", "last evaluation"),
    *("last training loss", "tokens/s", "took", "starts"),
)


def compare_page(runs: Sequence[RunRecord]) -> Page:
    """The page; a run is called by its folder, or its whole path where two folders have one name."""
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.run_dir) for run in runs]
    named = list(zip(labels, runs, strict=True))
    sections = [
        section("Results", [_results(named)]),
        section("Loss", _losses(named)),
        section("Gradient norm and speed", _norms_and_speed(named)),
        section("Settings that differ", [_differences(named)]),
    ]
    facts = [(label, run.state) for label, run in named]
    return Page(f"{len(runs)} runs", facts, [one for one in sections if one.parts])


def _losses(named: _Named) -> list[Part | None]:
    training, over_time, evaluation = [], [], []
    for label, run in named:
        history = run.history
        step, loss, seconds = (history.column(name) for name in ("step", "loss", "seconds"))
        training.append(Curve(label, step, loss))
        over_time.append(Curve(label, seconds.cumsum() / 60, loss))
        evaluation += [Curve(f"{label}{name}", *points) for name, points in evaluation_losses(history).items()]
    return [
        line_chart("evaluation", "Loss of the evaluation rows.", evaluation, STEP, _UNIT),
        line_chart("training", "Loss of the training rows.", training, STEP, _UNIT),
        line_chart("minutes", "Loss of the training rows over the time of the steps.", over_time, "minutes", _UNIT),
    ]


def _norms_and_speed(named: _Named) -> list[Part | None]:
    norms, speeds = [], []
    for label, run in named:
        step = run.history.column("step")
        norms.append(Curve(label, step, run.history.column("grad_norm")))
        speeds.append(Curve(label, step, tokens_per_second(run.history)))
    caption = "L2 norm of the gradient, before clipping."
    return [
        line_chart("gradient", caption, norms, STEP, "gradient norm", may_be_log=True),
        line_chart("speed", "Tokens per second, over all ranks.", speeds, STEP, "tokens/s"),
    ]


def _results(named: _Named) -> Table:
    least = min((values[-1] for _, run in named if (values := _evaluations(run))), default=math.nan)
    rows = [_result(label, run, least) for label, run in named]
    return Table("Loss in nats per label token; bold: the least of the last evaluations", _RESULTS, rows)


def _result(label: str, run: RunRecord, least: float) -> list[str | Value]:
    values = _evaluations(run) or [math.nan]
    loss, tokens, seconds = (run.history.column(name) for name in ("loss", "tokens", "seconds"))
    return [
        label,
        f"{run.last_step:,} of {run.max_steps:,}",
        _loss(values[0]),
        _loss(min(values)),
        Value(_loss(values[-1]), mark="best" if values[-1] == least else ""),
        _loss(loss[-1] if len(loss) else math.nan),
        f"{tokens.sum() / seconds.sum():,.0f}" if seconds.sum() else "",
        duration(run_seconds(run.history)),
        str(len(run.history.starts)),
    ]


def _evaluations(run: RunRecord) -> list[float]:
    return [float(entry["loss"]) for entry in run.history.of("eval")]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _differences(named: _Named) -> Table | str:
    settings: list[dict[str, Any]] = [
        flattened(run.config) | {"commit": run.environment.get("commit")} for _, run in named
    ]
    names = [name for name in dict.fromkeys(key for one in settings for key in one) if name != "run_dir"]
    rows = [[name, *(str(one.get(name, "")) for one in settings)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return "None: the runs have the same settings and the same commit."
    return Table("", ["setting", *(label for label, _ in named)], rows)
