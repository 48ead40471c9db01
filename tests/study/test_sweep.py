"""The grid of a sweep and its table."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from qvtune.config.load import load_config
from qvtune.errors import UserError
from qvtune.study.sweep import grid, results, write_table
from tests.support.processes import run_command

AXES = ("optimizer.lr=1e-4,2e-4", "optimizer.lr_multipliers.v=2,4")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path}/sweep\ntrain: {{max_steps: 6}}\ndata: {{eval: demo}}\n")
    return path


def record(run_dir: Path, *events: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def ended(step: int, loss: float, reason: str = "completed") -> list[dict[str, Any]]:
    """Events of a run that began with an evaluation loss of 3."""
    return [
        {"event": "eval", "step": 0, "loss": 3.0},
        {"event": "step", "step": step, "loss": 2.9},
        {"event": "eval", "step": step, "loss": loss},
        {"event": "run_end", "step": step, "reason": reason},
    ]


def test_the_last_setting_varies_fastest(recipe: Path, tmp_path: Path) -> None:
    points = grid(recipe, [*AXES, "train.seed=5"])
    assert [tuple(point.settings.values()) for point in points] == [
        ("1e-4", "2"),
        ("1e-4", "4"),
        ("2e-4", "2"),
        ("2e-4", "4"),
    ]
    configs = [load_config(recipe, point.overrides) for point in points]
    assert [(config.optimizer.lr, config.optimizer.lr_multipliers["v"]) for config in configs] == [
        (1e-4, 2.0),
        (1e-4, 4.0),
        (2e-4, 2.0),
        (2e-4, 4.0),
    ]
    assert {config.train.seed for config in configs} == {5}
    assert [config.run_dir for config in configs] == [str(point.run_dir) for point in points]
    assert points[1].run_dir == tmp_path / "sweep" / "lr=1e-4,lr_multipliers.v=4"


def test_commas_in_brackets_and_quotes_do_not_count(recipe: Path) -> None:
    points = grid(recipe, ["adapter.projections=[q, v],[v]", "optimizer.betas=[0.9, 0.95]", "run_dir=a,b"])
    configs = [load_config(recipe, point.overrides) for point in points]
    assert [config.adapter.projections for config in configs] == [("q", "v"), ("v",)]
    assert {config.optimizer.betas for config in configs} == {(0.9, 0.95)}
    assert [str(point.run_dir) for point in points] == ["a,b/projections=_q_v_", "a,b/projections=_v_"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.seed=1"], ["no setting has several values"]),
        (["train.seed=1,1"], ["train.seed repeats a value: 1, 1"]),
        (["optimizer.lr=1e-4,-1", "data.eval=null"], ["data.eval: null", "optimizer.lr=-1"]),
        (["optimizer.lrr=1,2"], ["optimizer.lrr=1", "optimizer.lrr=2"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe: Path, arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        grid(recipe, arguments)
    assert len(caught.value.problems) == len(parts)
    assert all(part in problem for part, problem in zip(parts, caught.value.problems, strict=True)), caught.value


def test_the_table_ranks_what_is_complete(recipe: Path, tmp_path: Path) -> None:
    points = grid(recipe, AXES)
    record(points[0].run_dir, *ended(6, 2.5))
    record(points[1].run_dir, *ended(4, 1.0, reason="stopped"))  # lower, but not at the end
    record(points[2].run_dir, *ended(4, 2.4, reason="stopped"), *ended(6, 2.25))
    rows = results(points)
    assert [(row["optimizer.lr"], row["optimizer.lr_multipliers.v"]) for row in rows[:2]] == [
        ("2e-4", "2"),
        ("1e-4", "2"),
    ]
    assert [row["state"] for row in rows] == ["completed", "completed", "not completed", "not started"]
    assert [row["step"] for row in rows] == [6, 6, 4, 0]
    assert [row["eval_loss"] for row in rows[:2]] == [2.25, 2.5]
    assert all(math.isnan(float(row["eval_loss"])) for row in rows[2:])

    write_table(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["eval_loss"] for row in read] == ["2.25", "2.5", "", ""]
    assert [row["run_dir"] for row in read] == [str(row["run_dir"]) for row in rows]


def test_the_command_prints_one_run_and_the_table(recipe: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "qvtune.study.sweep"]
    printed = run_command([*program, "point", "3", recipe, *AXES], tmp_path / "point", timeout=60)
    assert printed.stdout.split("\0") == [*grid(recipe, AXES)[3].overrides, ""], printed.output
    beyond = run_command([*program, "point", "4", recipe, *AXES], tmp_path / "beyond", timeout=60)
    assert beyond.code == 2 and "--array=0-3" in beyond.stderr, beyond.output
    table = run_command([*program, "table", recipe, *AXES], tmp_path / "table", timeout=60)
    assert table.code == 0 and table.stdout.count("not started") == 4, table.output
    assert (tmp_path / "sweep" / "sweep.csv").is_file()
