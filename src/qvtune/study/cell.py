"""Cells of a study: what each of its runs changes in a recipe, as GRID.yaml says.

    recipe: ../recipes/glue_sst2.yaml          # relative to this file
    run_dir: studies/glue                      # the study's folder; default: that of the recipe
    tasks:                                     # name -> settings
      sst2: {data.train: SST2/train.parquet, data.eval: SST2/dev.parquet}
      mrpc: {data.train: MRPC/train.parquet, data.eval: MRPC/dev.parquet, train.epochs: 20}
    cells:                                     # each combined with all of `factors`
      - {projections: qv, method: lora, rank: 8}
      - {projections: qkv, method: lora, parameters: 294912}
    factors:                                   # all combinations
      ratio: [1, 2, 4, 8]
      seed: [0, 1, 2]
      schedule.warmup_ratio: [0.0, 0.06]

Of ``tasks``, ``cells`` and ``factors`` one is enough. ``parameters`` are those of the adapter, without a head: the rank
is worked out from the model's shapes. A head keeps the recipe's rate with every ``learning_rate``, so that cells differ
in eta_QK and eta_V alone; ``optimizer.lr_multipliers`` in the grid, or ``optimizer.as_in_paper``, says otherwise.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvtune.config.adapter import AdapterSection
from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.errors import Problems, UserError
from qvtune.study.grid_file import FACTORS, PROJECTIONS, GridFile, read_grid_file

GRID_FILE = "grid.yaml"
_KEYS = {"learning_rate": "optimizer.lr", "seed": "train.seed"}
_SHORT = {"rank": "r", "parameters": "p", "ratio": "ratio", "learning_rate": "lr", "seed": "seed"}
_WITHOUT_RANK = ("ia3", "full", "bias")
RankOf = Callable[[RunConfig, int], int]  # a run, and how many parameters its adapter should have -> rank
Factors = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: of its folder, STUDY/cells/NAME; made of the factors that the grid gives.
        overrides: what it changes in the recipe, ``section.key=value`` as launch/train.py takes them.
        factors: ``task`` (None without ``tasks``), ``projections`` ("qv"), ``method``, ``rank`` (None where the method
            has none), ``ratio`` (lambda), ``learning_rate`` (eta_QK), ``seed``, and whatever else the grid gives
            (``parameters``, ``section.key``). The recipe's values where the grid gives none.
    """

    name: str
    overrides: tuple[str, ...]
    factors: Factors


@dataclass(frozen=True)
class Grid:
    """The cells of a study, its recipe, its folder, and what is to be known of the cells."""

    recipe: Path
    folder: Path
    cells: list[Cell]
    notes: list[str]


def read_grid(path: Path, overrides: Sequence[str] = (), rank_of: RankOf = lambda run, parameters: 1) -> Grid:
    """The cells of GRID.yaml; ``overrides`` replace settings of its recipe.

    ``rank_of`` works out ranks of equal parameter counts (``qvtune.study.counts``), which takes seconds; the default is
    enough to find what is wrong. Raises UserError with all problems of the file and of its cells.
    """
    file = read_grid_file(path)
    return grid_of(file, str(path), path.parent / file.recipe, overrides, rank_of)


def grid_of(
    file: GridFile,
    name: str,
    recipe: Path,
    overrides: Sequence[str] = (),
    rank_of: RankOf = lambda run, parameters: 1,
) -> Grid:
    """As ``read_grid``, of a file that was read; ``name`` stands before each problem."""
    builder = _Builder(name, recipe, tuple(overrides), file, rank_of)
    base = load_config(recipe, overrides)
    problems, found = Problems(), dict[str, Cell]()
    for given in _combinations(file):
        cell = problems.attempt(lambda given=given: builder.cell(given))  # type: ignore[misc]
        if cell is not None and found.setdefault(cell.name, cell) != cell:
            problems.found.append(f"{name}: two different cells are called {cell.name}")
    problems.raise_all()
    folder = Path(file.run_dir if file.run_dir is not None and not _sets_folder(overrides) else base.run_dir)
    return Grid(recipe, folder, list(found.values()), list(builder.notes))


def _sets_folder(overrides: Sequence[str]) -> bool:
    return any(one.startswith("run_dir=") for one in overrides)


def dump_cells(cells: Sequence[Cell]) -> str:
    """The content of STUDY/grid.yaml."""
    entries = [{"name": one.name, "factors": one.factors, "overrides": list(one.overrides)} for one in cells]
    return yaml.safe_dump({"cells": entries}, sort_keys=False, allow_unicode=True)


def read_cells(study: Path) -> list[Cell]:
    """The cells of the study in a folder, in the order of its grid. Raises UserError where there is none."""
    path = study / GRID_FILE
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not all("overrides" in one for one in content.get("cells", [{}])):
        raise UserError(f"{study} is no study; give a folder whose {GRID_FILE} launch/study.py grid has written")
    return [Cell(one["name"], tuple(one["overrides"]), one["factors"]) for one in content["cells"]]


def cell_folder(study: Path, cell: Cell) -> Path:
    """The run folder of a cell."""
    return study / "cells" / cell.name


def _combinations(file: GridFile) -> Iterator[Factors]:
    """What each cell is given. Tasks vary slowest: those on the same data follow each other."""
    factors: dict[str, Sequence[Any]] = {"task": list(file.tasks)} if file.tasks else {}
    factors |= file.factors
    for values in itertools.product(*factors.values()):
        for cell in file.cells or [{}]:
            yield {**dict(zip(factors, values, strict=True)), **cell}


@dataclass
class _Builder:
    """Makes cells of the factors that they are given."""

    source: str
    recipe: Path
    overrides: tuple[str, ...]
    file: GridFile
    rank_of: RankOf

    def __post_init__(self) -> None:
        self.notes: dict[str, None] = {}

    def cell(self, given: Factors) -> Cell:
        """Raises UserError for settings that do not go together."""
        settings = self._task_settings(given)
        settings |= {_KEYS.get(key, key): value for key, value in given.items() if key in _KEYS or "." in key}
        common = [override(key, value) for key, value in settings.items()]
        run = self._load(common)
        self._check(run)
        projections = tuple(given.get("projections", run.adapter.projections))
        method = given.get("method", run.adapter.method)
        given = self._with_effect(given, run, projections, method)
        if "parameters" in given:
            given = {**given, "rank": self._rank(given["parameters"], run, projections, method)}
        multipliers = {
            pattern: factor
            for pattern, factor in run.optimizer.lr_multipliers.items()
            if pattern.partition(".")[0] not in set(PROJECTIONS) - set(projections)
        }
        if given.get("ratio", 1) != 1 or "v" in multipliers:
            multipliers["v"] = given.get("ratio", multipliers.get("v", 1.0))
        if "optimizer.lr_multipliers" not in given:
            without_rate = [override(key, value) for key, value in self._task_settings(given).items()]
            multipliers |= head_multiplier(self._load(without_rate), run.optimizer.lr)
        own = [*_adapter(given, run.adapter, projections, method), override("optimizer.lr_multipliers", multipliers)]
        if "eval_rows" not in run.train.model_fields_set:
            own.append("train.eval_rows=true")
        for key, nothing in (("html", "false"), ("trackers", "[]")):  # a process for each costs more than a short cell
            if key not in run.report.model_fields_set:
                own.append(f"report.{key}={nothing}")
        final = self._load([*common, *own])
        return Cell(_name(given, projections), (*self.overrides, *common, *own), _factors(given, final))

    def _task_settings(self, given: Factors) -> dict[str, Any]:
        return dict(self.file.tasks.get(given.get("task", ""), {}))

    def _load(self, overrides: Sequence[str]) -> RunConfig:
        return load_config(self.recipe, [*self.overrides, *overrides], written_in=self.source)

    def _with_effect(self, given: Factors, run: RunConfig, projections: tuple[str, ...], method: str) -> Factors:
        """Without a ratio where nothing is trained at eta_V, without a rank where nothing has one."""
        given = dict(given)
        if given.get("ratio", 1) != 1 and "v" not in projections and not run.optimizer.as_in_paper:
            given["ratio"] = 1.0
            self.notes[f"projections {as_text(projections)}: without v the ratio has no effect, so there is only 1"] = (
                None
            )
        if method in _WITHOUT_RANK:
            for key in ("rank", "parameters"):
                if given.pop(key, None) is not None:
                    self.notes[f"method {method} has no rank"] = None
        return given

    def _rank(self, parameters: int, run: RunConfig, projections: tuple[str, ...], method: str) -> int:
        update = {"projections": projections, "method": method}
        rank = self.rank_of(run.model_copy(update={"adapter": run.adapter.model_copy(update=update)}), parameters)
        self.notes[f"parameters {parameters:,}: projections {as_text(projections)} ({method}) at rank {rank}"] = None
        return rank

    def _check(self, run: RunConfig) -> None:
        """What the cells of a study need."""
        problems = []
        if run.data.eval is None:
            problems.append("data.eval is not set: cells are compared by their evaluation")
        if run.checkpoint.resume == "never":
            problems.append("checkpoint.resume: never; an interrupted cell resumes from its checkpoint")
        for key in ("stop_after_step", "max_hours"):
            if getattr(run.train, key) is not None:
                problems.append(f"train.{key} is set: a cell would stop before its end; leave it out")
        if problems:
            raise UserError([f"{self.source}: {problem}" for problem in problems])


def _adapter(given: Factors, recipe: AdapterSection, projections: tuple[str, ...], method: str) -> list[str]:
    """Overrides of section ``adapter``; the whole section where the recipe may set what the method does not have."""
    settings: dict[str, Any] = {"method": method, "projections": list(projections)}
    if method not in _WITHOUT_RANK:
        settings |= {"rank": given["rank"]} if "rank" in given else {}
        return [override(f"adapter.{key}", value) for key, value in settings.items()]
    if method == recipe.method and recipe.biases:
        settings["biases"] = True
    return [override("adapter", settings)]


def head_multiplier(recipe: RunConfig, learning_rate: float) -> dict[str, float]:
    """``head: m`` with which a head keeps the recipe's rate when ``optimizer.lr`` is another.

    Empty where there is no head, where it follows eta_V as in the paper, and where the rate is the recipe's.
    """
    optimizer = recipe.optimizer
    if recipe.task == "causal_lm" or optimizer.as_in_paper or learning_rate == optimizer.lr:
        return {}
    head = optimizer.lr * optimizer.lr_multipliers.get("head", 1.0)
    return {"head": float(f"{head / learning_rate:.6g}")}


def override(key: str, value: Any) -> str:
    """``section.key=value``, where the value is read as YAML."""
    is_plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value
    return f"{key}={value if is_plain else json.dumps(value)}"


def as_text(projections: Sequence[str]) -> str:
    """``qv``, or ``q+gate``."""
    return ("" if all(len(one) == 1 for one in projections) else "+").join(projections)


def _factors(given: Factors, run: RunConfig) -> Factors:
    adapter = run.adapter
    return {
        "task": given.get("task"),
        "projections": as_text(adapter.projections),
        "method": adapter.method,
        "rank": adapter.rank if adapter.has_factors else None,
        "ratio": run.optimizer.lr_multipliers.get("v", 1.0),
        "learning_rate": run.optimizer.lr,
        "seed": run.train.seed,
        **{key: value for key, value in given.items() if key == "parameters" or "." in key},
    }


def _name(given: Factors, projections: tuple[str, ...]) -> str:
    """Of what the grid gives, so that a grid that grows keeps the names of its cells."""
    parts = []
    for key in sorted(given, key=lambda key: FACTORS.index(key) if key in FACTORS else len(FACTORS)):
        value = as_text(projections) if key == "projections" else given[key]
        if key == "rank" and "parameters" in given:
            continue
        value = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{key.partition('.')[2]}={value}" if "." in key else f"{_SHORT.get(key, '')}{value}")
    return "_".join(re.sub(r"[^\w.=+-]+", "-", part) for part in parts)
