"""STUDY/report.html, report.md, tables/*.csv and figures/*: what a study has found, from its folder alone."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.errors import UserError
from qvtune.report.page import Figure, Page, Section, Table, Value, as_html, as_markdown
from qvtune.storage.atomic import atomic_file
from qvtune.study import convergence, figures, tables
from qvtune.study.attention_report import attention_parts
from qvtune.study.compare import Comparison
from qvtune.study.extra import require_extra
from qvtune.study.results import Result, read_results
from qvtune.study.significance import RESAMPLES, RatioTest, ratio_tests
from qvtune.study.tables import Rows

FIGURES, TABLES = "figures", "tables"
_DIGITS = 10  # of a number in a CSV file


def write_report(study: Path, targets: Mapping[str, float] | None = None) -> Path:
    """Write the report of a study and return the path of report.html; the same folder gives the same bytes.

    ``targets``: task -> loss, for the steps and seconds to a given loss; the name "" stands for all other tasks. Raises
    UserError where the folder is no study, a target is of a task that it does not have, or a package for figures is not
    installed.
    """
    require_extra("matplotlib")
    results = read_results(study)
    targets = _by_task(results, targets or {})
    data: dict[str, Rows] = {"cells": [_cell_row(one) for one in results]}
    sections = [
        _results(results, data),
        _significance(results, data),
        _importance(results, data),
        _rates(results, data),
        _convergence(results, data, targets),
        _forgetting(results, data),
        _attention(results, data),
        Section("Cells without a result", list(filter(None, [tables.without_result(results)]))),
    ]
    page = Page(f"Study {study.resolve().name}", _facts(results), [one for one in sections if one.parts])
    for folder in (TABLES, FIGURES):
        (study / folder).mkdir(exist_ok=True)
    for name, rows in data.items():
        if rows:
            _write(study / TABLES / f"{name}.csv", _csv(rows).encode())
    for figure in page.figures():
        _write(study / FIGURES / f"{figure.name}.svg", figure.svg.encode())
        _write(study / FIGURES / f"{figure.name}.png", figure.png)
    _write(study / "report.md", as_markdown(page, FIGURES).encode())
    _write(study / "report.html", as_html(page).encode())
    console().print(f"{study / 'report.html'} ({dict(page.facts)['cells']} cells)", markup=False, soft_wrap=True)
    return study / "report.html"


def _by_task(results: Sequence[Result], targets: Mapping[str, float]) -> dict[str, float]:
    tasks = list(dict.fromkeys(one.task for one in results))
    if unknown := [task for task in targets if task and task not in tasks]:
        problems = [f"--target-loss: {task} is no task of the study; it has {', '.join(tasks)}" for task in unknown]
        raise UserError(problems)
    everywhere = dict.fromkeys(tasks, targets[""]) if "" in targets else {}
    return everywhere | {task: loss for task, loss in targets.items() if task}


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as private:
        private.write_bytes(content)


def _csv(rows: Rows) -> str:
    """All keys of all rows as columns; what a row does not have is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{_DIGITS}g}"
    return "" if value is None else value


def _cell_row(one: Result) -> dict[str, Any]:
    values = {
        f"{when} {name} {metric}": value
        for when, sets in (("before", one.before), ("after", one.after))
        for name, metrics in sets.items()
        for metric, value in metrics.items()
    }
    counts = {f"parameters {group}": count for group, count in one.parameters.items()}
    own = {"cell": one.cell.name, **one.cell.factors, "state": one.state, "reason": one.reason, "step": one.last_step}
    return own | counts | values


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    states = Counter(one.state for one in results)
    facts = [
        ("cells", f"{len(results)}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))),
        ("seeds", ", ".join(map(str, sorted({one.seed for one in results})))),
    ]
    configs = [one.config for one in results if one.config is not None]
    models = {Path(one.model.name_or_path).name + f" ({one.model.quantization})" for one in configs}
    batches = {f"{_length(one)} of {one.train.global_batch_size} rows" for one in configs}
    commits = {one.commit for one in results} - {""}
    for name, found in (("model", models), ("length", batches), ("commit", commits)):
        facts += [(name, ", ".join(sorted(found)))] if found else []
    return facts


def _length(config: RunConfig) -> str:
    train = config.train
    return f"{train.epochs:g} epochs" if train.epochs is not None else f"{train.max_steps} steps"


def _results(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    table, data["results"] = tables.results_table(results)
    text = (
        "Bold: the best of a column; underlined: the second. Each row is shown at the learning rate eta_QK that is "
        "best for it on the same evaluation rows, so all of them are a little too good. Percent where a metric is a "
        "share or a correlation. With the head twice: as PEFT before 0.6 counts, and the LoRA rows of the paper."
    )
    return Section("Results", [text, table])


def _significance(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    found = ratio_tests(results)
    if not found:
        return Section("Significance", [])
    data["significance"] = [_test_row(one) for one in found]
    headings = ["task", "trained", "lambda"]
    values = ["difference [95 %]", "p (Holm)", "verdict", "McNemar", "difference of loss [95 %]"]
    rows = [_test_cells(one) for one in found]
    text = (
        "Each lambda minus lambda = 1, both at their own best learning rate, on the same evaluation rows and seeds. "
        f"Intervals and p by a paired bootstrap: {RESAMPLES} resamples of the rows, random seed 0, the mean over seeds "
        "by Student's t (with one seed the interval knows the noise of the rows alone). p (Holm): corrected for "
        f"all {sum(one.metric is not None for one in found)} comparisons of this table, metric and loss apart. "
        "McNemar: exact test of each seed, rows that only lambda = 1 has right / rows that only this lambda has right; "
        "not corrected. The choice of the best rates is not part of the test."
    )
    table = Table(
        "Lambda against lambda = 1 at its own best rate", [*headings, *values], rows, num_labels=len(headings)
    )
    return Section("Significance", [text, table])


def _test_cells(one: RatioTest) -> list[str | Value]:
    label: list[str | Value] = [one.task, tables.name_of(one.family), f"{one.ratio:g}"]
    if one.metric is None or one.loss is None:
        return [*label, "", "", Value("no test", one.problem, "missing"), "", ""]
    mcnemar = Value("", "\n".join(f"seed {seed}: {lost} / {won}, p {p:.2g}" for seed, lost, won, p in one.mcnemar))
    rates = f"eta_QK {one.rate:g} against {one.rate_of_one:g}"
    return [
        *label,
        Value(_interval(one.metric, one.metric_name), rates),
        Value(f"{one.adjusted:.4f}", f"uncorrected {one.metric.p_value:.4f}"),
        Value(one.verdict, "", "best" if one.verdict == "better" else ""),
        mcnemar,
        Value(_interval(one.loss, "loss"), f"p (Holm) {one.adjusted_loss:.4f}"),
    ]


def _interval(found: Comparison, metric: str) -> str:
    scale = 100 if tables.title(metric).endswith("%") else 1
    digits = 2 if scale == 100 else 4
    low, middle, high = (f"{scale * value:+.{digits}f}" for value in (found.low, found.difference, found.high))
    return f"{middle} [{low}, {high}]"


def _test_row(one: RatioTest) -> dict[str, Any]:
    row: dict[str, Any] = {"task": one.task, **dict(one.family), "ratio": one.ratio, "metric": one.metric_name}
    row |= {"learning_rate": one.rate, "learning_rate_of_1": one.rate_of_one, "verdict": one.verdict}
    for name, found, adjusted in (("metric", one.metric, one.adjusted), ("loss", one.loss, one.adjusted_loss)):
        if found is not None:
            row |= {f"{name}_difference": found.difference, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= {f"{name}_p": found.p_value, f"{name}_p_holm": adjusted, "rows": found.num_rows}
            row |= {"seeds": found.num_seeds}
    for seed, lost, won, p_value in one.mcnemar:
        row |= {f"mcnemar_lost_seed_{seed}": lost, f"mcnemar_won_seed_{seed}": won, f"mcnemar_p_seed_{seed}": p_value}
    return row


def _importance(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    found = tables.importance_table(results)
    if found is None:
        return Section("Projections", [])
    table, data["importance"] = found
    figure = figures.importance_figure(results)
    return Section("Projections", [*([figure] if figure else []), table])


def _rates(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    grids = figures.rate_grids(results)
    data["rates"] = figures.rate_rows(grids)
    return Section("Learning rates", [figures.heat_maps(task, of_task) for task, of_task in grids.items()])


def _convergence(results: Sequence[Result], data: dict[str, Rows], targets: Mapping[str, float]) -> Section:
    found = convergence.lines(results)
    data["curves"] = convergence.line_rows(found)
    tasks = list(dict.fromkeys(line.task for line in found))
    parts: list[str | Table | Figure] = []
    parts += [figures.loss_figure(task, [line for line in found if line.task == task]) for task in tasks]
    speed = convergence.speed_table(results, found, targets)
    if speed is not None:
        table, data["speed"] = speed
        parts.append(
            "Steps until the loss of a seed is for the first time at most the target, which is the final loss of "
            "lambda = 1 where none was given. Seconds are those of training steps, without evaluations."
        )
        parts.append(table)
    return Section("Speed", parts)


def _forgetting(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    found = tables.forgetting_table(results)
    if found is None:
        return Section("Forgetting", [])
    table, data["forgetting"] = found
    return Section("Forgetting", [table])


def _attention(results: Sequence[Result], data: dict[str, Rows]) -> Section:
    parts, data["attention"] = attention_parts(results)
    return Section("Attention", parts)
