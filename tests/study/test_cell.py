"""From GRID.yaml to the cells of a study."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.study.cell import Cell, Grid, dump_cells, override, read_cells, read_grid

RECIPE = {
    "run_dir": "runs/study",
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "optimizer": {"lr_multipliers": {"head": 0.5, "v": 3.0}},
    "data": {"eval": "demo"},
    "train": {"max_steps": 6},
}


def write(folder: Path, grid: dict[str, Any], recipe: dict[str, Any] = RECIPE) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "grid.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", **grid}, sort_keys=False))
    return folder / "grid.yaml"


def configs(folder: Path, grid: Grid) -> dict[str, RunConfig]:
    """Cell -> its run, as launch/train.py would read it."""
    return {cell.name: load_config(folder / "recipe.yaml", cell.overrides) for cell in grid.cells}


def test_the_product_of_all_factors(tmp_path: Path) -> None:
    factors = {
        "projections": ["qv", ["v", "q", "k"]],
        "ratio": [1, "4"],
        "learning_rate": ["1e-4", 0.0002],
        "seed": [0, 1, 2],
        "schedule.warmup_ratio": [0.0, 0.06],
    }
    grid = read_grid(write(tmp_path, {"factors": factors}))
    assert len(grid.cells) == 2 * 2 * 2 * 3 * 2 and grid.folder == Path("runs/study") and not grid.notes
    found = configs(tmp_path, grid)
    run = found["qkv_ratio4_lr0.0002_seed2_warmup_ratio=0.06"]
    assert (run.adapter.projections, run.adapter.rank, run.adapter.alpha) == (("q", "k", "v"), 4, 8.0)
    assert (run.optimizer.lr, run.optimizer.lr_multipliers) == (2e-4, {"head": 0.5, "v": 4.0})
    assert (run.train.seed, run.schedule.warmup_ratio, run.train.eval_rows) == (2, 0.06, True)
    assert (run.report.html, run.report.trackers) == (False, ())
    assert found["qv_ratio1_lr0.0001_seed0_warmup_ratio=0"].optimizer.lr_multipliers == {"head": 0.5, "v": 1.0}
    (cell,) = [cell for cell in grid.cells if cell.name == "qkv_ratio4_lr0.0002_seed2_warmup_ratio=0.06"]
    expected = {"task": None, "projections": "qkv", "method": "lora", "rank": 4, "ratio": 4.0, "learning_rate": 2e-4}
    assert cell.factors == {**expected, "seed": 2, "schedule.warmup_ratio": 0.06}


def test_a_list_of_cells_each_with_all_factors_and_tasks(tmp_path: Path) -> None:
    grid = {
        "run_dir": "studies/glue",
        "tasks": {"one": {"data.train": "one.jsonl", "optimizer.lr": 0.1}, "two": {"data.train": "a b: c.jsonl"}},
        "cells": [{"method": "dora", "projections": "q+gate", "rank": 2}, {"method": "full", "learning_rate": 1e-5}],
        "factors": {"seed": [3, 5]},
    }
    found = read_grid(write(tmp_path, grid), ["train.max_steps=9"])
    assert found.folder == Path("studies/glue")
    assert [cell.name for cell in found.cells][:4] == [
        "one_q+gate_dora_r2_seed3",
        "one_full_lr1e-05_seed3",
        "one_q+gate_dora_r2_seed5",
        "one_full_lr1e-05_seed5",
    ]
    runs = configs(tmp_path, found)
    assert {run.train.max_steps for run in runs.values()} == {9}
    assert runs["two_full_lr1e-05_seed5"].data.train_sources[0].path == "a b: c.jsonl"
    dora, full = runs["one_q+gate_dora_r2_seed3"], runs["one_full_lr1e-05_seed3"]
    assert (dora.optimizer.lr, full.optimizer.lr) == (0.1, 1e-5)
    assert (full.adapter.method, full.adapter.projections) == ("full", ("q", "v"))
    assert dora.optimizer.lr_multipliers == {"head": 0.5}, "nothing of v is trained"
    assert full.optimizer.lr_multipliers == {"head": 0.5, "v": 3.0}
    assert [cell.factors["rank"] for cell in found.cells[:2]] == [2, None]


def test_what_has_no_effect_makes_no_second_cell(tmp_path: Path) -> None:
    factors = {"projections": ["qk", "qv"], "method": ["lora", "full"], "rank": [1, 2], "ratio": [1, 4]}
    grid = read_grid(write(tmp_path, {"factors": factors}))
    names = [cell.name for cell in grid.cells]
    assert sorted(names) == sorted(
        ["qk_lora_r1_ratio1", "qk_lora_r2_ratio1", "qk_full_ratio1", "qv_full_ratio1", "qv_full_ratio4"]
        + [f"qv_lora_r{rank}_ratio{ratio}" for rank in (1, 2) for ratio in (1, 4)]
    )
    assert "projections qk: without v the ratio has no effect, so there is only 1" in grid.notes


def test_where_the_head_follows_v_as_in_the_paper_a_ratio_has_an_effect(tmp_path: Path) -> None:
    recipe = {**RECIPE, "task": "sequence_classification", "optimizer": {"as_in_paper": True}}
    grid = read_grid(write(tmp_path, {"factors": {"projections": ["qk"], "ratio": [1, 4]}}, recipe))
    assert [run.optimizer.lr_multipliers for run in configs(tmp_path, grid).values()] == [{}, {"v": 4.0}]


def test_a_head_keeps_the_rate_of_the_recipe(tmp_path: Path) -> None:
    """Else learning_rate would change what the head learns as well, and lambda = 1 be compared with another head."""
    recipe = {**RECIPE, "task": "sequence_classification", "optimizer": {"lr": 2e-4, "lr_multipliers": {"head": 3.0}}}
    grid = {"tasks": {"a": {}, "b": {"optimizer.lr": 1e-4}}, "factors": {"learning_rate": [1e-4, 2e-4, 8e-4]}}
    found = configs(tmp_path, read_grid(write(tmp_path, grid, recipe)))
    rates = {name: run.optimizer.lr * run.optimizer.lr_multipliers["head"] for name, run in found.items()}
    assert len(rates) == 6
    assert all(rate == pytest.approx(6e-4 if name.startswith("a") else 3e-4) for name, rate in rates.items())
    given = {"cells": [{"learning_rate": 1e-4, "optimizer.lr_multipliers": {"head": 0.5}}]}
    (run,) = configs(tmp_path, read_grid(write(tmp_path, given, recipe))).values()
    assert run.optimizer.lr_multipliers == {"head": 0.5}


def test_equal_parameter_counts(tmp_path: Path) -> None:
    def rank_of(run: RunConfig, parameters: int) -> int:
        return parameters // len(run.adapter.projections)

    grid = {"factors": {"projections": ["v", "qk"], "parameters": [8]}}
    found = read_grid(write(tmp_path, grid), rank_of=rank_of)
    assert [(cell.name, cell.factors["rank"], cell.factors["parameters"]) for cell in found.cells] == [
        ("v_p8", 8, 8),
        ("qk_p8", 4, 8),
    ]
    assert [run.adapter.rank for run in configs(tmp_path, found).values()] == [8, 4]
    assert found.notes == [
        "parameters 8: projections v (lora) at rank 8",
        "parameters 8: projections qk (lora) at rank 4",
    ]


def test_the_study_is_read_back(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, {"factors": {"projections": ["qk", "qv"], "ratio": [1, 2], "seed": [0, 1]}}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "grid.yaml").write_text(dump_cells(grid.cells))
    found = read_cells(tmp_path / "study")
    assert found == grid.cells and isinstance(found[0], Cell)
    for folder in (tmp_path, tmp_path / "other"):  # in one of them there is a grid.yaml that a person has written
        with pytest.raises(UserError, match=r"is no study; give a folder whose grid\.yaml"):
            read_cells(folder)


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ({}, ["no cells: give `factors`, `cells` or `tasks`"]),
        ({"factor": {}}, ["`factor` is not a setting; did you mean `factors`?"]),
        ({"factors": {"ration": [1], "rank": [], "seed": [1, 1]}}, ["`ratio`?", "`factors.rank`", "`factors.seed`"]),
        ({"factors": {"projections": ["qx"], "task": ["a"]}}, ["projections 'qx'", "task 'a' is none of"]),
        ({"factors": {"rank": [1]}, "cells": [{"rank": 2}]}, ["`rank` is in `factors` and in `cells`"]),
        ({"factors": {"rank": [1]}, "cells": [{"parameters": 2}]}, ["`cells[0]` has a rank and a number"]),
        ({"factors": {"parameters": [0.5]}}, ["parameters 0.5; give a whole number > 0"]),
        ({"factors": {"optimizer.lrr": [1, 2]}}, ["optimizer.lrr=1", "optimizer.lrr=2"]),
        ({"factors": {"method": ["lore"], "seed": [-1]}}, ["train.seed=-1"]),
        ({"factors": {"method": ["lore"]}}, ["adapter.method=lore"]),
        ({"tasks": {"a": {"train": 1}}}, ["`tasks.a.train`: write settings as `section.key`"]),
        ({"tasks": {"a": {"data.eval": None, "train.max_hours": 1}}}, ["data.eval is not set", "train.max_hours is"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, grid: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_grid(write(tmp_path, grid))
    assert len(caught.value.problems) == len(parts), caught.value.problems
    for part, problem in zip(parts, caught.value.problems, strict=True):
        assert part in problem and str(tmp_path / "grid.yaml") in problem


@pytest.mark.parametrize("value", ["SST2/train.parquet", "yes", "1e-4", "a: b", "[1]", "", 1e-4, [1, "a"], None, True])
def test_an_override_is_read_as_the_value_that_was_given(value: Any) -> None:
    assert yaml.safe_load(override("data.train", value).partition("=")[2]) in (value, str(value))
