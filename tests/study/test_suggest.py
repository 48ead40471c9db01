"""From a recipe to a suggestion: budgets, cells, folders, and a search that is killed again and again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qvtune.config.load import dump_config, load_config
from qvtune.errors import UserError
from qvtune.study.search import COST, SEEDS, Rates, Trial
from qvtune.study.suggest import (
    Request,
    cell_of,
    check_recipe,
    claim,
    read_outcome,
    read_results,
    search_all,
    search_of,
)
from qvtune.study.suggest_report import write
from tests.study.suggest_worker import REQUEST, STEPS, recipe, run_cell, search
from tests.support import synthetic
from tests.support.processes import REPOSITORY
from tests.support.synthetic import KINDS

OUTPUTS = ("verdict.json", "suggestion.yaml", "search.svg", "search.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "search"
    search(folder)
    return folder


def start_worker(folder: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"}
    return subprocess.Popen([sys.executable, "-m", "tests.study.suggest_worker", str(folder)], env=environment)


def cells_of(folder: Path) -> int:
    return len(list((folder / "cells").glob("*")))


def test_a_search_that_is_killed_ends_with_the_same_verdict_byte_for_byte(finished: Path, tmp_path: Path) -> None:
    """Killed with one run begun, in the second stage, and in the last one; then once more to the end."""
    folder = tmp_path / "search"
    for cells in (1, 9, cells_of(finished) - 1):
        worker = start_worker(folder)
        while cells_of(folder) < cells:
            assert worker.poll() is None
            time.sleep(0.01)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert not (folder / "verdict.json").exists()
    assert start_worker(folder).wait(timeout=300) == 0
    for name in OUTPUTS:
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    written = {name: (folder / name).stat().st_mtime_ns for name in ("cells",)}
    search(folder)  # everything is there: nothing is run
    assert (folder / "verdict.json").read_bytes() == (finished / "verdict.json").read_bytes()
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written


def test_the_suggestion_is_a_recipe_with_the_verdict_above_it(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    assert verdict["kind"] == "recommended" and verdict["comparison"]["high"] < 0
    assert verdict["sentences"][0].startswith("recommended: eta_QK = ")
    assert any("95 % interval" in line for line in verdict["sentences"])
    assert any(line.startswith("Cost: ") and "of them failed" in line for line in verdict["sentences"])
    text = (finished / "suggestion.yaml").read_text()
    assert text.startswith("# recommended: ")
    run = load_config(finished / "suggestion.yaml")
    qk, v = verdict["rates"]
    assert run.optimizer.lr == qk and run.optimizer.lr * run.optimizer.lr_multipliers["v"] == pytest.approx(v, rel=1e-4)
    changed = run.model_copy(update={"optimizer": recipe().optimizer})
    assert dump_config(changed) == dump_config(recipe()), "all else is the recipe's"


def test_where_nothing_is_decided_the_better_of_the_two_is_suggested_and_it_is_said(tmp_path: Path) -> None:
    settings = synthetic.search_of(most_seeds=SEEDS)
    landscape = replace(KINDS["lambda 8 is better"], seed_noise=0.03, number=2)
    verdict, results = synthetic.search_all(settings, landscape)
    assert verdict.kind == "not decided" and verdict.rates is None and verdict.comparison.difference < 0
    said = write(tmp_path, verdict, settings, results, recipe())
    assert said[1].startswith(f"Until then the better of the two: eta_QK = {verdict.other.qk:.3g}, ")
    assert (tmp_path / "suggestion.yaml").read_text().startswith("# not decided: needs ")
    assert load_config(tmp_path / "suggestion.yaml").optimizer.lr == verdict.other.qk
    assert json.loads((tmp_path / "verdict.json").read_text())["suggested"] == list(verdict.other)
    assert replace(verdict, comparison=replace(verdict.comparison, difference=0.0)).suggested == verdict.equal


def test_a_search_goes_on_only_with_its_own_settings(finished: Path) -> None:
    settings = search_of(recipe(), STEPS, REQUEST)
    claim(finished, recipe(), search_of(recipe(), STEPS, Request(budget=40.0, margin=0.05)))  # more seeds, same runs
    with pytest.raises(UserError) as caught:
        claim(finished, recipe(adapter={"rank": 4}), search_of(recipe(), STEPS, Request(budget=24.0, low=1e-5)))
    assert [problem.partition(": ")[2].partition("; ")[0] for problem in caught.value.problems] == [
        "search.low is 2.5e-05 there, 1e-05 now",
        "recipe.adapter.rank is 16 there, 4 now",
    ]
    assert settings == search_of(recipe(), STEPS, REQUEST)


def test_a_budget_is_refused_with_what_is_needed() -> None:
    run = recipe()
    with pytest.raises(UserError) as caught:
        search_of(run, 10_000, Request(budget=0.1))
    needed = float(caught.value.problems[0].split("give --budget ")[1].split(" ")[0])
    assert search_of(run, 10_000, Request(budget=needed)).steps == 150
    assert needed == pytest.approx(COST * 150 / 10_000, abs=1e-3)
    with pytest.raises(UserError, match="--budget"):
        search_of(run, 10_000, Request(budget=needed - 0.002))
    assert search_of(run, 60, Request(budget=24.0)).steps == 60, "a short recipe is searched at its own length"


@pytest.mark.parametrize(("budget", "total"), [(0.3, 10_000), (1.0, 10_000), (24.0, 400), (17.0, 100)])
def test_a_budget_is_kept(budget: float, total: int) -> None:
    settings = search_of(recipe(), total, Request(budget=budget))
    most = COST * settings.steps + 2 * (settings.most_seeds - SEEDS) * settings.steps
    assert most <= budget * total and settings.steps <= total and settings.most_seeds >= SEEDS


def test_a_larger_budget_keeps_the_runs_of_a_search_that_was_begun() -> None:
    first = search_of(recipe(), 10_000, Request(budget=0.3))
    more = search_of(recipe(), 10_000, Request(budget=0.6), steps=first.steps)
    assert more.steps == first.steps and more.most_seeds > first.most_seeds


def test_the_box_holds_the_recipes_rates() -> None:
    settings = search_of(recipe(), STEPS, REQUEST)
    assert (settings.low, settings.high) == (2e-4 / 8, 8e-4 * 8)
    with pytest.raises(UserError, match=r"--low, --high: from 0.0005 to 0.01; the recipe's rates, eta_QK 0.0002"):
        search_of(recipe(), STEPS, Request(budget=24.0, low=5e-4, high=1e-2))


def test_what_cannot_be_searched_is_refused_all_at_once() -> None:
    run = recipe(
        adapter={"projections": ["q"]},
        optimizer={"lr_multipliers": {"B": 16.0, "q.A": 2.0}},
        data={"eval": None},
        train={"max_steps": 3, "max_hours": 1.0},
        checkpoint={"resume": "never"},
    )
    with pytest.raises(UserError) as caught:
        check_recipe(run)
    assert [problem.split(" ")[0].rstrip(":") for problem in caught.value.problems] == [
        "data.eval",
        "adapter.projections",
        "optimizer.lr_multipliers",
        "checkpoint.resume",
        "train.max_hours",
    ]
    check_recipe(recipe())


def test_a_cell_changes_rates_length_and_seed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(recipe()))
    cell = cell_of(Trial(Rates(1e-4, 1.6e-3), 50, 1003), recipe())
    run = load_config(path, cell.overrides)
    assert (run.optimizer.lr, run.optimizer.lr_multipliers) == (1e-4, {"v": 16.0})
    assert (run.train.max_steps, run.train.seed, run.train.eval_rows) == (50, 1003, True)
    assert not run.report.html and not run.report.trackers
    left = {section: getattr(recipe(), section) for section in ("optimizer", "train", "report")}
    assert run.model_copy(update=left) == recipe()


def test_a_head_keeps_its_rate() -> None:
    """Or it would follow eta_QK, and the search would compare heads."""
    run = recipe(task="sequence_classification", optimizer={"lr": 2e-4, "lr_multipliers": {"head": 3.0, "v": 4.0}})
    for qk in (1e-5, 2e-4, 1e-3):
        settings = dict(one.split("=", 1) for one in cell_of(Trial(Rates(qk, 1e-3), 50, 0), run).overrides)
        assert json.loads(settings["optimizer.lr_multipliers"])["head"] * qk == pytest.approx(6e-4, rel=1e-5)


def test_only_complete_and_failed_runs_are_results(tmp_path: Path) -> None:
    trial = Trial(Rates(2e-4, 8e-4), 50, 0)
    cell = cell_of(trial, recipe())
    folder = tmp_path / "cells" / cell.name
    assert read_results(tmp_path, "eval") == {}
    run_cell(folder, cell, KINDS["lambda 8 is better"])
    outcome = read_outcome(folder, "eval")
    expected = KINDS["lambda 8 is better"].run(trial, STEPS)
    assert outcome is not None and expected.losses is not None
    np.testing.assert_array_equal(outcome.losses, expected.losses)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("completed", "stopped"))
    assert read_outcome(folder, "eval") is None and read_results(tmp_path, "eval") == {}
    (folder / "failed.txt").write_text("the loss is nan\n")
    assert read_results(tmp_path, "eval")[cell.name].failed == "the loss is nan"


def test_runs_that_are_left_undone_end_the_search(tmp_path: Path) -> None:
    settings = search_of(recipe(), STEPS, REQUEST)
    with pytest.raises(UserError) as caught:
        search_all(tmp_path, recipe(), settings, lambda cells: None)
    assert len(caught.value.problems) == SEEDS and "the same command goes on" in caught.value.problems[0]
