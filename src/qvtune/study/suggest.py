"""Recommends eta_QK and eta_V for a recipe and its data, from short complete runs on that data.

The folder of a search holds ``search.yaml`` (what is searched), ``cells/`` (the runs), and in the end ``verdict.json``,
``search.svg`` and ``suggestion.yaml``, a recipe. The run folders are all that is remembered: whatever was interrupted,
the same command goes on and ends with the same verdict.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.report.metrics import read_metrics
from qvtune.storage.atomic import atomic_file
from qvtune.study.cell import Cell, head_multiplier, override
from qvtune.study.results import eval_rows
from qvtune.study.search import COST, SEEDS, Outcome, Rates, Search, Trial
from qvtune.study.verdict import Verdict, next_cells
from qvtune.study.worker import FAILED

SEARCH_FILE = "search.yaml"
SHORTEST = 150  # optimizer steps of a full run of the search; less is mostly warm-up and noise
_OCTAVES = 3  # searched below and above the recipe's rates
_RESERVE = 2  # seeds of the two finalists on top, if the budget allows

Evaluate = Callable[[Sequence[Cell]], None]  # runs cells, each in its folder


@dataclass(frozen=True)
class Request:
    """What was typed: ``budget`` in runs of the recipe; ``low`` and ``high`` of both rates, None for the default."""

    budget: float
    margin: float = 0.02
    low: float | None = None
    high: float | None = None


def check_recipe(run: RunConfig) -> None:
    """Raises UserError with everything for which a recipe cannot be searched."""
    optimizer, train = run.optimizer, run.train
    problems = []
    if run.data.eval is None:
        problems.append("data.eval is not set: settings are compared by their loss on its rows")
    if "v" not in run.adapter.projections or not {"q", "k"} & set(run.adapter.projections):
        problems.append(
            f"adapter.projections: {', '.join(run.adapter.projections)}; lambda = eta_V / eta_QK needs v, and q or k"
        )
    if others := [key for key in optimizer.lr_multipliers if key not in ("v", "head")]:
        problems.append(
            f"optimizer.lr_multipliers has {', '.join(others)}: the search sets optimizer.lr and the multiplier of v; "
            "only v and head may be there"
        )
    if run.checkpoint.resume == "never":
        problems.append("checkpoint.resume: never; an interrupted run resumes from its checkpoint")
    for key in ("stop_after_step", "max_hours", "early_stopping"):
        if getattr(train, key) is not None:
            problems.append(f"train.{key} is set: runs would end at other steps than their schedule; leave it out")
    if problems:
        raise UserError(problems)


def search_of(
    run: RunConfig, total_steps: int, request: Request, balance: float | None = None, steps: int | None = None
) -> Search:
    """The search that the budget allows. ``total_steps``: of the recipe; ``steps``: of a full run of a search that was
    begun, which goes on with a larger budget.

    Raises UserError where it is too small, with the budget that is needed, and for a box without the recipe's rates.
    """
    start = start_of(run)
    low = request.low or min(start) / 2**_OCTAVES
    high = request.high or max(start) * 2**_OCTAVES
    shortest = min(total_steps, SHORTEST)
    affordable = request.budget * total_steps
    with_reserve = int(affordable / (COST + 2 * _RESERVE))
    steps = steps or min(total_steps, max(min(shortest, int(affordable / COST)), with_reserve))
    problems = []
    if steps < shortest:
        needed = math.ceil(1000 * shortest * COST / total_steps) / 1000
        problems.append(
            f"--budget: {request.budget:.3g} runs of {total_steps} steps; the search takes {COST:.1f} runs of at least "
            f"{shortest} steps: give --budget {needed:.4g} ({needed:.1%}) or more"
        )
    if not low < min(start) <= max(start) < high:
        problems.append(
            f"--low, --high: from {low:.3g} to {high:.3g}; the recipe's rates, eta_QK {start.qk:.3g} and eta_V "
            f"{start.v:.3g}, must lie between them"
        )
    if problems:
        raise UserError(problems)
    most_seeds = SEEDS + int((affordable - COST * steps) / (2 * steps))
    return Search(start, low, high, steps, run.train.seed, balance, request.margin, max(SEEDS, most_seeds))


def start_of(run: RunConfig) -> Rates:
    """The recipe's rates."""
    lr = run.optimizer.lr
    return Rates(*(float(f"{eta:.2e}") for eta in (lr, lr * run.optimizer.lr_multipliers.get("v", 1.0))))


def cell_of(trial: Trial, run: RunConfig) -> Cell:
    """The run as a cell. A head keeps the recipe's rate, which would otherwise follow eta_QK."""
    settings = {
        **rate_settings(trial.rates, run),
        "train.max_steps": trial.steps,
        "train.epochs": None,
        "train.seed": trial.seed,
        "train.eval_rows": True,
        "train.eval_every": 0,
        "train.eval_at_start": False,
        "train.save_every": 0,
        "train.generate": None,
        "report.html": False,
        "report.trackers": [],
    }
    if run.task == "causal_lm":
        settings["train.best_metric"] = "auto"
    factors = {"learning_rate": trial.rates.qk, "ratio": trial.rates.ratio, "seed": trial.seed}
    return Cell(trial.name, tuple(override(key, value) for key, value in settings.items()), factors)


def rate_settings(rates: Rates, run: RunConfig) -> dict[str, object]:
    """Settings that give these rates."""
    multipliers = {
        **{key: value for key, value in run.optimizer.lr_multipliers.items() if key == "head"},
        "v": float(f"{rates.ratio:.6g}"),
        **head_multiplier(run, rates.qk),
    }
    return {"optimizer.lr": rates.qk, "optimizer.lr_multipliers": multipliers}


def search_all(folder: Path, run: RunConfig, search: Search, evaluate: Evaluate) -> tuple[Verdict, dict[str, Outcome]]:
    """Run what the search asks for until there is a verdict.

    Raises UserError where the folder belongs to another search, and where runs are left undone.
    """
    claim(folder, run, search)
    evaluation_set = next(iter(run.data.eval_sets))
    while True:
        results = read_results(folder, evaluation_set)
        found = next_cells(search, results)
        if isinstance(found, Verdict):
            return found, results
        evaluate([cell_of(trial, run) for trial in found])
        done = read_results(folder, evaluation_set)
        if missing := [trial.name for trial in found if trial.name not in done]:
            raise UserError([f"{folder}/cells/{name} is not complete; the same command goes on" for name in missing])


def claim(folder: Path, run: RunConfig, search: Search) -> None:
    """Write ``search.yaml``. Raises UserError where the folder has one of other settings.

    What may change from one start to the next, margin and number of seeds, is not in it: it changes no run.
    """
    settings = {**asdict(search), "start": list(search.start)}
    kept = {key: value for key, value in settings.items() if key not in ("margin", "most_seeds")}
    content = {"search": kept, "recipe": yaml.safe_load(dump_config(run))}
    there = begun(folder)
    if there is None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / SEARCH_FILE) as private:
            private.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    elif different := _differences(there, content):
        place, advice = folder / SEARCH_FILE, "give another --output, or the settings of the search there"
        raise UserError([f"{place}: {one}; {advice}" for one in different])


def begun(folder: Path) -> dict[str, Any] | None:
    """The content of ``search.yaml``; None where there is none."""
    path = folder / SEARCH_FILE
    content: dict[str, Any] | None = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return content


def _differences(there: object, here: object, key: str = "") -> list[str]:
    """Settings whose values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [
            one
            for name in keys
            for one in _differences(there.get(name), here.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if there == here else [f"{key} is {there} there, {here} now"]


def read_results(folder: Path, evaluation_set: str) -> dict[str, Outcome]:
    """The results of all complete and failed runs, by the names of their folders."""
    found = {}
    for cell in sorted((folder / "cells").glob("*")):
        outcome = read_outcome(cell, evaluation_set)
        if outcome is not None:
            found[cell.name] = outcome
    return found


def read_outcome(cell: Path, evaluation_set: str) -> Outcome | None:
    """Losses of the rows after the last step; why it failed; None where it is neither complete nor failed."""
    if (cell / FAILED).is_file():
        return Outcome(None, failed=(cell / FAILED).read_text(encoding="utf-8").strip())
    if not (cell / "metrics.jsonl").is_file():
        return None
    ends = [one for one in read_metrics(cell, "run_end") if one["reason"] == "completed"]
    if not ends:
        return None
    rows = eval_rows(cell, ends[-1]["step"], evaluation_set)
    return Outcome(rows["loss"], rows["tokens"])
