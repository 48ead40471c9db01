"""Folders of studies as launch/study.py grid writes them, with simulated results whose truth is known."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.study.cell import Cell

Skill = Callable[[Mapping[str, Any]], float]  # factors of a cell -> how well it learns, in logits
STEPS, EVAL_EVERY, NUM_ROWS = 40, 8, 300
HEAD = 1154
_SECONDS = 0.5


def cell(**factors: Any) -> Cell:
    """A cell whose factors not given are those of a usual run."""
    usual = {"task": None, "projections": "qv", "method": "lora", "rank": 8, "ratio": 1.0, "learning_rate": 1e-3}
    given = usual | {"seed": 0} | factors
    name = "_".join(str(value) for value in given.values() if value is not None)
    return Cell(name, (), given)


def by_rates(factors: Mapping[str, Any]) -> float:
    """A skill with the best eta_V at 4e-3 and the best eta_QK at 1e-3, which matters less."""
    eta_qk, ratio = factors["learning_rate"], factors["ratio"]
    if "v" not in factors["projections"]:
        return 0.8 - 0.1 * math.log2(eta_qk / 4e-3) ** 2
    loss_of_rates = 0.16 * math.log2(eta_qk * ratio / 4e-3) ** 2 + 0.03 * math.log2(eta_qk / 1e-3) ** 2
    return 1.8 - loss_of_rates + 0.1 * ("q" in factors["projections"])


def make_study(
    folder: Path,
    cells: Sequence[Cell],
    skill: Skill = by_rates,
    other_sets: Iterable[str] = (),
    num_rows: int = NUM_ROWS,
) -> Path:
    """A study of classifiers in ``folder``, all of whose cells are done."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"cells": [{"name": one.name, "factors": one.factors, "overrides": []} for one in cells]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for one in cells:
        make_run(folder, one, skill(one.factors), ["eval", *other_sets], num_rows)
    return folder


def make_run(study: Path, cell: Cell, skill: float, sets: Sequence[str], num_rows: int) -> None:
    """A finished run: the task's set first, whose rows are harder or easier for all cells alike."""
    folder = study / "cells" / cell.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(_config(study, cell)))
    (folder / "environment.json").write_text(json.dumps({"commit": "0123abc"}))
    per_projection = 64 * (cell.factors["rank"] or 1)
    trained = dict.fromkeys(cell.factors["projections"], per_projection) | {"head": HEAD}
    events: list[dict[str, Any]] = [{"event": "run_start", "step": 0, "trained_parameters": trained}]
    rows = []
    rng = np.random.default_rng([cell.factors["seed"], *cell.name.encode()])
    own_skill = skill + 0.05 * rng.standard_normal()
    for step in range(STEPS + 1):
        share = 1 - math.exp(-step / 10)
        if step:
            loss = 0.7 - 0.5 * share * own_skill / 2 + 0.01 * rng.standard_normal()
            events.append({"event": "step", "step": step, "loss": loss, "seconds": _SECONDS, "label_tokens": 32})
        if step % EVAL_EVERY == 0:
            found = {name: evaluated(own_skill * share, rng, num_rows, name != sets[0]) for name in sets}
            rows += [{"step": step, "set": name, **lists} for name, (lists, _) in found.items()]
            metrics = {name: values for name, (_, values) in found.items()}
            more = {"sets": metrics} if len(sets) > 1 else {}
            events.append({"event": "eval", "step": step, **metrics[sets[0]], "seconds": 1.0, **more})
    events.append({"event": "run_end", "step": STEPS, "reason": "completed", "seconds": 30.0})
    write_lines(folder / "metrics.jsonl", ({**event, "time": 0.0} for event in events))
    write_lines(folder / "eval_rows.jsonl", rows)


def write_lines(path: Path, objects: Iterable[Any]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))


def evaluated(
    skill: float, rng: np.random.Generator, num_rows: int, is_other: bool
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Lists over rows, and their metrics. What is not the task gets worse."""
    common = np.random.default_rng(int(is_other))
    labels, difficulty = common.integers(0, 2, num_rows), common.standard_normal(num_rows)
    margins = (0.5 - 0.1 * skill if is_other else skill) + difficulty + 0.4 * rng.standard_normal(num_rows)
    predictions = np.where(margins > 0, labels, 1 - labels)
    losses = np.log1p(np.exp(-margins))
    lists = {"loss": losses.tolist(), "tokens": [1] * num_rows}
    lists |= {"prediction": predictions.tolist(), "label": labels.tolist()}
    metrics = {
        "loss": float(losses.mean()),
        "accuracy": float((labels == predictions).mean()),
    }
    return lists, metrics


def _config(study: Path, cell: Cell) -> RunConfig:
    factors = cell.factors
    multipliers = {"v": factors["ratio"]} if "v" in factors["projections"] else {}
    return RunConfig.model_validate(
        {
            "task": "sequence_classification",
            "classification": {"labels": ["no", "yes"]},
            "run_dir": str(study / "cells" / cell.name),
            "model": {"name_or_path": "models/tiny", "quantization": "none"},
            "adapter": {"projections": list(factors["projections"]), "rank": factors["rank"]},
            "optimizer": {"lr": factors["learning_rate"], "lr_multipliers": multipliers},
            "data": {"train": "train.tsv", "eval": "dev.tsv"},
            "train": {"max_steps": STEPS, "eval_every": EVAL_EVERY, "seed": factors["seed"], "eval_rows": True},
        }
    )
