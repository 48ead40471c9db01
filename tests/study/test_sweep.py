"""A grid on the command line: the cells of a study, and its report."""

import csv
import sys
from pathlib import Path

import pytest

from qvtune.config.load import load_config
from qvtune.errors import UserError
from qvtune.study.cell import read_cells
from qvtune.study.sweep import point, sweep
from tests.support.processes import run_command
from tests.support.studies import make_run

AXES = ("optimizer.lr=1e-4,2e-4", "optimizer.lr_multipliers.v=2,4")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path}/sweep\ntrain: {{max_steps: 6}}\ndata: {{eval: demo}}\n")
    return path


def test_the_last_setting_varies_fastest(recipe: Path, tmp_path: Path) -> None:
    configs = [load_config(recipe, point(index, recipe, [*AXES, "train.seed=5"])) for index in range(4)]
    assert [(config.optimizer.lr, config.optimizer.lr_multipliers["v"]) for config in configs] == [
        (1e-4, 2.0),
        (1e-4, 4.0),
        (2e-4, 2.0),
        (2e-4, 4.0),
    ]
    assert {config.train.seed for config in configs} == {5}
    cells = read_cells(tmp_path / "sweep")
    assert [config.run_dir for config in configs] == [str(tmp_path / "sweep" / "cells" / cell.name) for cell in cells]
    assert [(cell.factors["learning_rate"], cell.factors["ratio"]) for cell in cells[:2]] == [(1e-4, 2.0), (1e-4, 4.0)]


def test_commas_in_brackets_and_quotes_do_not_count(recipe: Path) -> None:
    grid = sweep(recipe, ["adapter.projections=[q, v],[v]", "optimizer.betas=[0.9, 0.95]", "run_dir=a,b"])
    configs = [load_config(recipe, cell.overrides) for cell in grid.cells]
    assert [config.adapter.projections for config in configs] == [("q", "v"), ("v",)]
    assert {config.optimizer.betas for config in configs} == {(0.9, 0.95)}
    assert str(grid.folder) == "a,b"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.seed=1"], ["no setting has several values"]),
        (["train.seed=1,1"], ["each once"]),
        (["optimizer.lr=1e-4,-1", "data.eval=null"], ["data.eval is not set", "optimizer.lr=-1"]),
        (["optimizer.lrr=1,2"], ["optimizer.lrr=1", "optimizer.lrr=2"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    recipe: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        point(0, recipe, arguments)
    assert len(caught.value.problems) == len(parts)
    assert all(part in problem for part, problem in zip(parts, caught.value.problems, strict=True)), caught.value
    assert not (tmp_path / "sweep").exists()


def test_the_command_prints_one_run_and_the_report(recipe: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "qvtune.study.sweep"]
    printed = run_command([*program, "point", "3", recipe, *AXES], tmp_path / "point", timeout=60)
    assert printed.stdout.split("\0") == [*point(3, recipe, AXES), ""], printed.output
    beyond = run_command([*program, "point", "4", recipe, *AXES], tmp_path / "beyond", timeout=60)
    assert beyond.code == 2 and "--array=0-3" in beyond.stderr, beyond.output
    first, *_ = read_cells(tmp_path / "sweep")
    make_run(tmp_path / "sweep", first, 1.0, ["eval"], 20)
    table = run_command([*program, "table", recipe, *AXES], tmp_path / "table", timeout=120)
    assert table.code == 0 and table.stdout.count("not started") >= 3, table.output
    with (tmp_path / "sweep" / "tables" / "cells.csv").open(newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done", *["not started"] * 3]
