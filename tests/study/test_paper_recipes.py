"""launch/recipes/paper: recipes and all cells of the grids pass the configuration's checks; settings of the paper."""

from functools import cache
from pathlib import Path

import pytest

from qvtune.config.load import load_config
from qvtune.study.cell import Cell, read_grid
from qvtune.study.suggest import check_recipe
from tests.plan.recipe_headers import CLUSTERS, GRIDS
from tests.support.processes import REPOSITORY

FOLDER = REPOSITORY / "launch" / "recipes" / "paper"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.endswith("_grid"))
GRID_FILES = sorted(FOLDER.glob("*_grid.yaml"))


@cache
def cells_of(path: Path) -> list[Cell]:
    """Reading a grid checks the configuration of each of its cells."""
    return read_grid(path).cells


def test_discovery_finds_recipes_and_grids_and_all_have_estimates() -> None:
    assert len(RECIPES) == 2 and len(GRID_FILES) == 3
    assert {f"paper/{path.stem}" for path in RECIPES} <= CLUSTERS.keys()
    assert {f"paper/{path.stem}" for path in GRID_FILES} == GRIDS.keys()
    assert all(
        str(path).endswith(f"{GRIDS[f'paper/{grid.stem}']}.yaml")
        for grid in GRID_FILES
        for path in [FOLDER / recipe_of(grid)]
    )


def recipe_of(grid: Path) -> str:
    return next(line.split(": ")[1] for line in grid.read_text().splitlines() if line.startswith("recipe: "))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_papers(path: Path) -> None:
    run = load_config(path)
    check_recipe(run)
    assert run.task == "sequence_classification" and run.data.max_length == 128 and run.data.packing is False
    assert run.adapter.projections == ("q", "v") and run.adapter.dropout == 0.1
    assert run.schedule.warmup_ratio == 0 and run.optimizer.weight_decay == 0
    text = path.read_text()
    assert f"launch/train.py --config launch/recipes/paper/{path.name}" in text
    assert all(word in text for word in ("# Hardware", "#   Memory", "#   Time", "#   Run", "# What differs: "))


@pytest.mark.parametrize("path", GRID_FILES, ids=lambda path: path.stem)
def test_a_grid_separates_lambda_from_the_choice_of_matrices(path: Path) -> None:
    """Which the paper's table does not: all pairs of ratio, rate and seed are there for q and v and for all three."""
    cells = cells_of(path)
    assert len(cells) > 100
    for task in {cell.factors["task"] for cell in cells}:
        found = {
            projections: {
                (cell.factors["ratio"], cell.factors["learning_rate"], cell.factors["seed"])
                for cell in cells
                if (cell.factors["task"], cell.factors["projections"]) == (task, projections)
            }
            for projections in ("qv", "qkv")
        }
        assert found["qv"] == found["qkv"]
        assert {ratio for ratio, _, _ in found["qv"]} >= {1, 2, 4}
        assert len({rate for ratio, rate, _ in found["qv"] if ratio == 1}) >= 2, "lambda = 1 at several rates"
        assert len({seed for _, _, seed in found["qv"]}) >= 3
    text = path.read_text()
    assert f"launch/study.py grid launch/recipes/paper/{path.name}" in text and " hours, one run at a time" in text


def test_each_rate_of_v_is_there_with_each_of_q() -> None:
    pairs = {
        (cell.factors["learning_rate"], float(f"{cell.factors['learning_rate'] * cell.factors['ratio']:.3g}"))
        for cell in cells_of(FOLDER / "heatmap_grid.yaml")
    }
    assert pairs == {(qk, v) for qk in (1e-6, 1e-5, 5e-5, 1e-4, 2e-4, 4e-4) for v in (1e-4, 2e-4, 4e-4)}
