"""The tables of a study: results in the layout of the paper's Table 2, importance of projections, forgetting.

Each function gives a table for people, and the numbers behind it for a CSV file.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from qvtune.model.adapters import HEAD
from qvtune.report.page import Mark, Table, Value
from qvtune.study.results import Result, Spread, at_best, by_ratio, families_of, spread, tasks_of

Rows = list[dict[str, Any]]
Family = tuple[tuple[str, Any], ...]
PROJECTION_SETS = ("q", "k", "v", "qk", "qv", "kv", "qkv")
_PERCENT = ("accuracy", "f1", "matthews", "pearson", "spearman", "token_accuracy", "exact_match")
_FIRST = ("method", "projections", "rank")
_SHOWN_REASON = 90  # characters, in a cell of the table


def number(metric: str, value: float) -> str:
    """Shares and correlations in percent, losses with four digits."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.2f}" if metric in _PERCENT else f"{value:.4f}"


def title(metric: str) -> str:
    """The metric with its unit."""
    return f"{metric} %" if metric in _PERCENT else metric


def shown(metric: str, found: Spread) -> str:
    """Mean and standard deviation."""
    text = number(metric, found.mean)
    return text if math.isnan(found.deviation) else f"{text} ± {number(metric, found.deviation)}"


def family_columns(results: Iterable[Result]) -> list[str]:
    """The factors that tell families apart, those of the paper's table first."""
    found = list(dict.fromkeys(key for one in results for key, _ in one.family))
    return [*(key for key in _FIRST if key in found), *(key for key in found if key not in _FIRST)]


def family_values(family: Family, columns: Sequence[str]) -> list[str]:
    """What a family has in these columns, as text."""
    values = dict(family)
    return [_factor(values.get(column)) for column in columns]


def _factor(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def name_of(family: Family) -> str:
    """A family in a few words: ``lora qv rank 8``."""
    values = dict(family)
    size = f" rank {values['rank']}" if values.get("rank") else ""
    size = f" {values['parameters']:,} parameters" if values.get("parameters") else size
    others = [f" {key} {_factor(value)}" for key, value in family if key not in (*_FIRST, "parameters")]
    return f"{values.get('method')} {values.get('projections')}{size}{''.join(others)}"


def parameter_counts(results: Iterable[Result]) -> list[tuple[int, int, int]]:
    """Adapters alone, with the head, and with the head twice, of all tasks, in rising order."""
    counts = set()
    for one in results:
        if one.parameters:
            head = one.parameters.get(HEAD, 0)
            adapters = sum(one.parameters.values()) - head
            counts.add((adapters, adapters + head, adapters + 2 * head))
    return sorted(counts)


def _count_columns(results: Sequence[Result]) -> list[str]:
    """Three columns, each a range where tasks have heads of different sizes."""
    counts = parameter_counts(results)
    if not counts:
        return ["–"] * 3
    ranges = [sorted(set(column)) for column in zip(*counts, strict=True)]
    return [f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}" for found in ranges]


def marks(values: Sequence[float], higher_is_better: bool) -> list[Mark]:
    """Which of the values is the best and which the second; equal ones share their mark. NaN has none."""
    order = sorted({value for value in values if not math.isnan(value)}, reverse=higher_is_better)
    names: dict[float, Mark] = dict(zip(order, ("best", "second"), strict=False))
    return [names.get(value, "") for value in values]


def results_table(results: Sequence[Result]) -> tuple[Table, Rows]:
    """Methods, projections and lambda as rows, tasks as columns; each at the learning rate that is best for it."""
    columns = family_columns(results)
    settings = [
        (family, ratio, found)
        for family, of_family in families_of(results).items()
        for ratio, found in by_ratio(of_family).items()
    ]
    before: list[str | Value] = ["before tuning", *[""] * len(columns), "0", "", ""]
    shown_rows: list[list[str | Value]] = [
        [*family_values(family, columns), f"{ratio:g}", *_count_columns(found)] for family, ratio, found in settings
    ]
    headings, rows = [], []
    for task, of_task in tasks_of(results).items():
        sets = list(dict.fromkeys(name for one in of_task for name in one.after)) or [""]
        metric = next((one.metric for one in of_task if one.metric), "")
        column = [[one for one in found if one.task == task] for _, _, found in settings]
        for name in sets:
            headings.append(" ".join(filter(None, (task, name if len(sets) > 1 else "", title(metric)))))
            before.append(shown(metric, before_training(of_task, metric, name)))
            values = [spread(one.value(None, name) for one in at_best(found)) for found in column]
            marked = marks([value.mean for value in values], any(one.higher_is_better for one in of_task))
            for row, found, value, mark in zip(shown_rows, column, values, marked, strict=True):
                cell = _cell(found, metric, value, mark)
                row.append(cell if name == sets[0] else Value(cell.text, "", cell.mark))
                rows += [_csv_row(found, metric, name, value)] if found else []
    counts = ["adapter parameters", "with head", "with head twice"]
    heading = "At the best learning rate of each row, mean ± standard deviation over seeds"
    return Table(heading, [*columns, "lambda", *counts, *headings], [before, *shown_rows], len(columns) + 1), rows


def before_training(results: Sequence[Result], metric: str, evaluation_set: str) -> Spread:
    """Of the first cell of each seed: adapters start at zero, so that only the head and its seed matter."""
    values: dict[int, float] = {}
    for one in results:
        found = one.before.get(evaluation_set or next(iter(one.before), ""), {})
        if metric in found:
            values.setdefault(one.seed, found[metric])
    return spread(values.values())


def _cell(found: Sequence[Result], metric: str, value: Spread, mark: Mark) -> Value:
    """The value, or why there is none."""
    best = at_best(found)
    if not found:
        return Value("–", "not in the grid", "missing")
    if not best:
        failed = [one for one in found if one.state == "failed"]
        if failed:
            return Value("failed", _short(failed[0].reason), "failed")
        return Value(next((one.state for one in found if one.state == "not finished"), "not started"), "", "missing")
    same = [one for one in found if one.eta_qk == best[0].eta_qk]
    notes = [f"eta_QK {best[0].eta_qk:g}, n {len(best)}"]
    notes += [f"{lost} of {len(same)} seeds missing"] if (lost := len(same) - len(best)) else []
    notes += [f"{bad} of {len(found)} cells failed"] if (bad := sum(one.state == "failed" for one in found)) else []
    notes += [f"the {edge} rate of the grid"] if (edge := edge_of(found)) else []
    return Value(shown(metric, value), "\n".join(notes), mark)


def edge_of(results: Sequence[Result]) -> str:
    """``lowest`` or ``highest``, where the best learning rate is such among those tried with its lambda; else empty."""
    best = at_best(results)
    if not best:
        return ""
    rates = sorted({one.eta_qk for one in results if one.state == "done" and one.ratio == best[0].ratio})
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(best[0].eta_qk, "") if len(rates) > 1 else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_REASON else text[: _SHOWN_REASON - 3] + "..."


def _csv_row(found: Sequence[Result], metric: str, evaluation_set: str, value: Spread) -> dict[str, Any]:
    best, counts = at_best(found), parameter_counts(found)
    states = [one.state for one in found]
    return {
        "task": found[0].task,
        "set": evaluation_set,
        "metric": metric,
        **dict(found[0].family),
        "ratio": found[0].ratio,
        "learning_rate": best[0].eta_qk if best else None,
        "edge_of_grid": edge_of(found),
        "mean": value.mean,
        "standard_deviation": value.deviation,
        "seeds": value.count,
        **dict(zip(("adapter", "with_head", "with_head_twice"), counts[-1] if counts else (None,) * 3, strict=True)),
        **{state.replace(" ", "_"): states.count(state) for state in ("done", "failed", "not finished", "not started")},
    }


def without_result(results: Sequence[Result]) -> Table | None:
    """The cells that have none, with the reason."""
    rows: list[list[str | Value]] = [
        [one.cell.name, Value(one.state, "", "failed" if one.state == "failed" else "missing"), one.reason]
        for one in results
        if one.state != "done"
    ]
    return Table("", ["cell", "state", "reason"], rows, num_labels=3) if rows else None


def importance_groups(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """``lora rank 8``, or ``lora 36,864 parameters`` -> projections -> results; groups of at least two sets.

    A group of equal count also has what was given by its rank and has just that count.
    """
    families = families_of(results)
    groups: dict[str, dict[str, list[Result]]] = {}
    for family, found in families.items():
        groups.setdefault(_group(family), {}).setdefault(str(dict(family).get("projections")), []).extend(found)
    counts = dict.fromkeys(count for family in families if (count := dict(family).get("parameters")))
    for (family, found), count in product(families.items(), counts):
        if "parameters" not in dict(family) and [one for one, _, _ in parameter_counts(found)] == [count]:
            group = groups.get(_group((*family, ("parameters", count))), {})
            group.setdefault(str(dict(family).get("projections")), found)
    return {name: _in_order(found) for name, found in groups.items() if len(found) > 1}


def _group(family: Family) -> str:
    values = dict(family)
    count, rank = values.get("parameters"), values.get("rank")
    size = f"{count:,} parameters" if count else f"rank {rank}" if rank else ""
    others = [f"{key} {_factor(value)}" for key, value in family if key not in (*_FIRST, "parameters")]
    return " ".join(filter(None, (str(values.get("method")), size, *others)))


def _in_order(found: dict[str, list[Result]]) -> dict[str, list[Result]]:
    known = [name for name in PROJECTION_SETS if name in found]
    return {name: found[name] for name in [*known, *(name for name in found if name not in known)]}


IMPORTANCE: dict[str, Callable[[Sequence[Result]], list[Result]]] = {
    "lambda = 1": lambda results: at_best([one for one in results if one.ratio == 1]),
    "best lambda": at_best,
}


def importance_table(results: Sequence[Result]) -> tuple[Table, Rows] | None:
    """Sets of projections as columns, at equal rank and at equal parameter count; None where there is one set only."""
    table_rows: list[list[str | Value]] = []
    rows: Rows = []
    columns = [name for found in importance_groups(results).values() for name in found]
    columns = list(_in_order({name: [] for name in columns}))
    for task, of_task in tasks_of(results).items():
        for group, sets in importance_groups(of_task).items():
            for choice, choose in IMPORTANCE.items():
                chosen = {name: choose(sets.get(name, [])) for name in columns}
                values = {name: spread(one.value() for one in found) for name, found in chosen.items()}
                first = next((found[0] for found in chosen.values() if found), None)
                if first is None:
                    continue
                marked = marks([value.mean for value in values.values()], first.higher_is_better)
                cells = [
                    Value(
                        shown(first.metric, values[name]),
                        _importance_note(chosen[name], sets.get(name, []), choice),
                        mark,
                    )
                    for name, mark in zip(columns, marked, strict=True)
                ]
                table_rows.append([f"{task}, {title(first.metric)}", group, choice, *cells])
                rows += [
                    {**_csv_row(found, first.metric, "", values[name]), "group": group, "choice": choice}
                    for name, found in chosen.items()
                    if found
                ]
    if not table_rows:
        return None
    heading = "Projections, each at its own best learning rate, mean ± standard deviation over seeds"
    return Table(heading, ["task", "size", "lambda", *columns], table_rows, num_labels=3), rows


def _importance_note(found: Sequence[Result], all_rates: Sequence[Result], choice: str) -> str:
    if not found:
        return ""
    counts = parameter_counts(found)
    notes = [f"{counts[0][0]:,} parameters"] if counts else []
    notes += [f"lambda {found[0].ratio:g}"] if choice == "best lambda" else []
    edge = edge_of([one for one in all_rates if one.ratio == found[0].ratio])
    return "\n".join([*notes, f"eta_QK {found[0].eta_qk:g}", *([f"the {edge} rate of the grid"] if edge else [])])


def forgetting_table(results: Sequence[Result]) -> tuple[Table, Rows] | None:
    """Change of the loss on the evaluation sets after the first, as of a general text; None where there are none."""
    columns, rows = family_columns(results), []
    table_rows: list[list[str | Value]] = []
    for task, of_task in tasks_of(results).items():
        names = list(dict.fromkeys(name for one in of_task for name in list(one.after)[1:]))
        settings = [
            (family, ratio, at_best(found))
            for family, of_family in families_of(of_task).items()
            for ratio, found in by_ratio(of_family).items()
        ]
        for name in names:
            values = [spread(_change(one, name) for one in found) for _, _, found in settings]
            for (family, ratio, found), value, mark in zip(
                settings, values, marks([value.mean for value in values], higher_is_better=False), strict=True
            ):
                if not found:
                    continue
                task_value = spread(one.value() for one in found)
                before = spread(one.before[name]["loss"] for one in found)
                after = spread(one.value("loss", name) for one in found)
                change = Value(f"{value.mean:+.4f} ± {number('loss', value.deviation)}", "", mark)
                label = [task, name, *family_values(family, columns), f"{ratio:g}", f"{found[0].eta_qk:g}"]
                metric = f"{shown(found[0].metric, task_value)}"
                table_rows.append([*label, metric, shown("loss", before), shown("loss", after), change])
                rows.append(_csv_row(found, "loss", name, after) | {"before": before.mean, "change": value.mean})
    if not table_rows:
        return None
    headings = ["task", "other set", *columns, "lambda", "eta_QK"]
    values_of = ["task's metric", "loss before", "loss after", "change"]
    text = "Loss on other evaluation sets, before and after training, nats per label"
    return Table(text, [*headings, *values_of], table_rows, num_labels=len(headings)), rows


def _change(one: Result, name: str) -> float:
    return one.value("loss", name) - one.before.get(name, {}).get("loss", math.nan)
