"""What the cells of a study have given, read from their run folders alone."""

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import ValidationError

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.report.json_lines import read_json_lines
from qvtune.study.cell import Cell, cell_folder, read_cells
from qvtune.study.worker import FAILED
from qvtune.tasks import get_task
from qvtune.train.early_stopping import followed_metric
from qvtune.train.recorder import EVAL_ROWS_FILE

State = Literal["done", "failed", "not finished", "not started"]
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OWN = ("task", "seed", "learning_rate", "ratio")  # factors that do not tell families of settings apart


@dataclass(frozen=True)
class Curve:
    """Losses in nats per label, each with its step and the seconds of training up to it."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        metric: the one that decides which checkpoint is the best.
        before, after: evaluation set -> metric -> value before training and after its last step; the first set is the
            task's. ``after`` is empty unless the cell is done.
        evaluations, training: losses on the first evaluation set, and of the training steps.
        parameters: projection, or head -> trained parameters; empty where the run has not said.
        reason: why the cell has failed.
    """

    cell: Cell
    folder: Path
    state: State
    reason: str = ""
    metric: str = ""
    higher_is_better: bool = False
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluations: Curve = field(default_factory=lambda: Curve([], [], []))
    training: Curve = field(default_factory=lambda: Curve([], [], []))
    parameters: dict[str, int] = field(default_factory=dict)
    last_step: int = 0
    commit: str = ""
    config: RunConfig | None = None

    @property
    def task(self) -> str:
        """Its name; of a study of one task ``task``."""
        return str(self.cell.factors.get("task") or "task")

    @property
    def family(self) -> tuple[tuple[str, Any], ...]:
        """All that is chosen but lambda, learning rate, seed and task; mappings and lists as JSON."""
        return tuple(
            (key, value if isinstance(value, Hashable) else json.dumps(value))
            for key, value in self.cell.factors.items()
            if key not in _OWN
        )

    @property
    def ratio(self) -> float:
        """Lambda."""
        return float(self.cell.factors["ratio"])

    @property
    def eta_qk(self) -> float:
        """Peak learning rate of q and k."""
        return float(self.cell.factors["learning_rate"])

    @property
    def eta_v(self) -> float:
        """Peak learning rate of v, to six digits, so that 3 * 1e-4 is 3e-4."""
        return float(f"{self.eta_qk * self.ratio:.6g}")

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.cell.factors["seed"])

    def value(self, metric: str | None = None, evaluation_set: str | None = None) -> float:
        """After training; of the task's metric and the first set unless others are named. NaN where there is none."""
        name = evaluation_set or next(iter(self.after), "")
        return self.after.get(name, {}).get(metric or self.metric, math.nan)

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Loss, number of labels, and of classifiers prediction and label of each row of the first evaluation set after
        training; empty where they were not recorded."""
        return eval_rows(self.folder, self.last_step, next(iter(self.after), "")) if self.state == "done" else {}


def eval_rows(folder: Path, step: int, evaluation_set: str) -> dict[str, np.ndarray]:
    """What a run has recorded of each row of a set after a step, the last time; empty where it has nothing."""
    path = folder / EVAL_ROWS_FILE
    entries = read_json_lines(path) if path.is_file() else []
    entries = [one for one in entries if one["step"] == step and one["set"] == evaluation_set]
    lists = {key: value for key, value in entries[-1].items() if isinstance(value, list)} if entries else {}
    return {key: np.array(value, dtype=float) for key, value in lists.items()}


def read_results(study: Path) -> list[Result]:
    """Of all cells, in the order of the grid. Raises UserError where the folder is no study."""
    return [_read(study, cell) for cell in read_cells(study)]


def _read(study: Path, cell: Cell) -> Result:
    folder = cell_folder(study, cell)
    failed = folder / FAILED
    reason = failed.read_text(encoding="utf-8").strip() if failed.is_file() else ""
    if not ((folder / "metrics.jsonl").is_file() and (folder / "config.yaml").is_file()):
        return Result(cell, folder, "failed" if failed.is_file() else "not started", reason)
    config = _config(folder / "config.yaml")
    metric, higher_is_better = followed_metric(config.train, get_task(config.task, config.classification))
    events = read_json_lines(folder / "metrics.jsonl")
    evaluations = {one["step"]: _sets(one) for one in events if one["event"] == "eval"}
    ends = [one for one in events if one["event"] == "run_end"]
    last_step = ends[-1]["step"] if ends and ends[-1]["reason"] == "completed" else 0
    after = evaluations.get(last_step, {}) if last_step else {}
    state: State = "done" if after else "not finished"
    value = next(iter(after.values()), {}).get(metric, math.nan)
    if after and not math.isfinite(value):
        state, reason = "failed", f"{metric} after training is {value}"
    if failed.is_file():
        state = "failed"
    training = _training(events)
    return Result(
        cell=cell,
        folder=folder,
        state=state,
        reason=reason,
        metric=metric,
        higher_is_better=higher_is_better,
        before=evaluations.get(0, {}),
        after=after if state == "done" else {},
        evaluations=_evaluations(evaluations, training),
        training=training,
        parameters=_parameters(events),
        last_step=last_step,
        commit=_commit(folder),
        config=config,
    )


def _config(path: Path) -> RunConfig:
    """Ten times as fast as ``load_config``, which finds the line of each setting; it has the last word on mistakes."""
    try:
        return RunConfig.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader))
    except (yaml.YAMLError, ValidationError):
        return load_config(path)


def _sets(event: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by evaluation set; one alone is called ``eval``."""
    own = {key: value for key, value in event.items() if key not in ("event", "time", "step", "seconds", "sets")}
    return dict(event.get("sets") or {"eval": own})


def _training(events: Sequence[dict[str, Any]]) -> Curve:
    """A step that was run twice (crash, resume) counts as it was run last."""
    found = {int(one["step"]): one for one in events if one["event"] == "step"}
    steps = [found[step] for step in sorted(found)]
    seconds = np.cumsum([one["seconds"] for one in steps]).tolist()
    return Curve([one["step"] for one in steps], [one["loss"] for one in steps], seconds)


def _evaluations(found: dict[int, dict[str, dict[str, float]]], training: Curve) -> Curve:
    seconds = {0: 0.0, **dict(zip(training.steps, training.seconds, strict=True))}
    steps = sorted(found)
    losses = [next(iter(found[step].values())).get("loss", math.nan) for step in steps]
    return Curve(steps, losses, [seconds.get(step, math.nan) for step in steps])


def _parameters(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    starts = [one for one in events if one["event"] == "run_start"]
    return dict(starts[-1].get("trained_parameters", {})) if starts else {}


def _commit(folder: Path) -> str:
    path = folder / "environment.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("commit") or "") if path.is_file() else ""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1; NaN for one) of ``count`` values."""

    mean: float
    deviation: float
    count: int


def spread(values: Iterable[float]) -> Spread:
    """Of finite values; the mean of none is NaN."""
    found = np.array([value for value in values if math.isfinite(value)], dtype=float)
    mean = float(found.mean()) if len(found) else math.nan
    return Spread(mean, float(found.std(ddof=1)) if len(found) > 1 else math.nan, len(found))


def at_best(results: Sequence[Result]) -> list[Result]:
    """Those that are done at the learning rate, and lambda, with the best mean over seeds; in the order of seeds.

    Only settings with the most seeds count: where some seeds have failed, the others would say too much. Of equal ones
    it is that with the smallest lambda, then the smallest rate. Empty where no cell is done.
    """
    settings: dict[tuple[float, float], list[Result]] = {}
    for one in sorted((one for one in results if one.state == "done"), key=lambda one: one.seed):
        settings.setdefault((one.ratio, one.eta_qk), []).append(one)
    most = max(map(len, settings.values()), default=0)
    complete = [settings[key] for key in sorted(settings) if len(settings[key]) == most]
    if not complete:
        return []
    means = [spread(one.value() for one in found).mean for found in complete]
    best = max(means) if complete[0][0].higher_is_better else min(means)
    return complete[means.index(best)]


def tasks_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Task -> its results, in the order of the grid."""
    tasks = dict.fromkeys(one.task for one in results)
    return {task: [one for one in results if one.task == task] for task in tasks}


def families_of(results: Sequence[Result]) -> dict[tuple[tuple[str, Any], ...], list[Result]]:
    """Family -> its results, in the order of the grid."""
    families = dict.fromkeys(one.family for one in results)
    return {family: [one for one in results if one.family == family] for family in families}


def by_ratio(results: Sequence[Result]) -> dict[float, list[Result]]:
    """Lambda -> results, in rising order."""
    ratios = sorted({one.ratio for one in results})
    return {ratio: [one for one in results if one.ratio == ratio] for ratio in ratios}
