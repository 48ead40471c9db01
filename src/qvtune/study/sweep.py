"""A grid of runs and the table of their evaluation losses, for slurm/sweep.sbatch.

``python -m qvtune.study.sweep point INDEX RECIPE [override ...]`` prints the overrides of one run, each followed by a
zero byte. ``... table RECIPE [override ...]`` shows the results of all runs and writes them to ``run_dir/sweep.csv``.
"""

import csv
import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvtune.config.load import load_config, split_override
from qvtune.errors import UserError
from qvtune.report.metrics import read_metrics

# A value of a comma-separated list; commas inside brackets and quotes do not separate.
_VALUE = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    settings: dict[str, str]  # those with several values in the sweep
    overrides: tuple[str, ...]  # all overrides of the run, its run_dir last
    run_dir: Path


def grid(recipe: Path, arguments: Sequence[str]) -> list[Point]:
    """All combinations of the values in ``section.key=value,value``; the last setting varies fastest.

    The folder of a run is named after its values and is in the recipe's ``run_dir``. Raises UserError if no setting has
    several values or a value is repeated, and with all problems of the runs' configurations.
    """
    axes = [(key, _values(key, text)) for key, text in map(split_override, arguments)]
    swept = [key for key, values in axes if len(values) > 1]
    problems = [f"sweep: {key} repeats a value: {', '.join(values)}" for key, values in axes if _repeats(values)]
    if not swept:
        problems.append("sweep: no setting has several values; give one, e.g. optimizer.lr=1e-4,2e-4")
    if problems:
        raise UserError(problems)
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        overrides = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        settings = {key: value for (key, _), value in zip(axes, values, strict=True) if key in swept}
        try:
            config = load_config(recipe, overrides)
        except UserError as error:
            problems += error.problems
            continue
        if config.data.eval is None:
            problems.append(
                "data.eval: null; the runs of a sweep are compared by their evaluation loss: give evaluation rows"
            )
        run_dir = Path(config.run_dir) / _folder_name(settings)
        points.append(Point(settings, (*overrides, f"run_dir={run_dir}"), run_dir))
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return points


def _values(key: str, text: str) -> list[str]:
    return [text] if key == "run_dir" else _VALUE.findall(text) or [text]


def _repeats(values: Sequence[str]) -> bool:
    return len(set(values)) < len(values)


def _folder_name(settings: dict[str, str]) -> str:
    """``lr=1e-4,lr_multipliers.v=2``: without section names, and without characters unfit for a file name."""
    parts = (f"{key.partition('.')[2]}={value}" for key, value in settings.items())
    return ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in parts)


def results(points: Sequence[Point]) -> list[dict[str, str | int | float]]:
    """One row per run: complete runs by increasing final evaluation loss, then the others.

    Losses are in nats per label token; ``eval_loss`` is nan until the run is complete.
    """
    rows = [{**point.settings, **_result(point.run_dir), "run_dir": str(point.run_dir)} for point in points]
    return sorted(rows, key=lambda row: (math.isnan(float(row["eval_loss"])), row["eval_loss"]))


def _result(run_dir: Path) -> dict[str, str | int | float]:
    nothing = math.nan
    if not (run_dir / "metrics.jsonl").exists():
        return {"state": "not started", "step": 0, "eval_loss_before": nothing, "eval_loss": nothing}
    evals = {entry["step"]: entry["loss"] for entry in read_metrics(run_dir, "eval")}
    steps = [entry["step"] for entry in read_metrics(run_dir, "step")]
    ends = [entry["step"] for entry in read_metrics(run_dir, "run_end") if entry["reason"] == "completed"]
    return {
        "state": "completed" if ends else "not completed",
        "step": max(steps, default=0),
        "eval_loss_before": evals.get(0, nothing),
        "eval_loss": evals[ends[-1]] if ends else nothing,
    }


def write_table(rows: Sequence[dict[str, str | int | float]], path: Path) -> None:
    """Write the rows as CSV; an unknown loss is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)


def _show(rows: Sequence[dict[str, str | int | float]]) -> None:
    from rich.table import Table

    from qvtune.console import console

    table = Table()
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console().print(table)


def main(arguments: Sequence[str]) -> int:
    """Run a command (see the top of this file); returns 0, or the exit code of a UserError, which is printed."""
    command, *rest = arguments
    try:
        if command == "point":
            index, recipe, *overrides = rest
            points = grid(Path(recipe), overrides)
            if int(index) >= len(points):
                raise UserError(
                    f"sweep: there is no run {index}, the grid has {len(points)}: --array=0-{len(points) - 1}"
                )
            sys.stdout.write("".join(f"{override}\0" for override in points[int(index)].overrides))
        else:
            assert command == "table", command
            points = grid(Path(rest[0]), rest[1:])
            rows, path = results(points), points[0].run_dir.parent / "sweep.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(rows, path)
            _show(rows)
            sys.stdout.write(f"{path}\n")
    except UserError as error:
        sys.stderr.writelines(f"error: {problem}\n" for problem in error.problems)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
