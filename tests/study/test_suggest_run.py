"""The whole of `launch/study.py suggest`, with real runs of a tiny model."""

import json
from pathlib import Path

import pytest

from qvtune.config.load import load_config
from qvtune.errors import UserError
from qvtune.study.suggest import Request, read_results
from qvtune.study.suggest_run import suggest


@pytest.fixture
def recipe(llama_fp32_folder: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        (json.dumps({"prompt": "What does it do", "completion": " it does what the name says"}) + "\n") * 20
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
run_dir: {tmp_path}/run
deepspeed: zero2.json
model: {{name_or_path: {llama_fp32_folder}, quantization: none, dtype: float32, attention: sdpa}}
adapter: {{rank: 4, alpha: 8}}
optimizer: {{lr: 1.0e-3, lr_multipliers: {{v: 4.0}}}}
data: {{train: {rows}, eval: {rows}, max_length: 64}}
train: {{max_steps: 9, global_batch_size: 2}}
"""
    )
    return path


def test_a_budget_that_is_too_small_is_refused_before_anything_is_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--budget: 14 runs of 9 steps; the search takes 16.9 runs of at least 9 steps"
    ):
        suggest(recipe, [], tmp_path / "search", Request(budget=14.0), balance=True, workers=1)
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
def test_a_search_ends_with_a_recipe_that_can_be_trained(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "search"
    suggest(recipe, ["train.seed=5"], folder, Request(budget=17.0), balance=True, workers=2)
    shown = capsys.readouterr().out
    assert "warning: below 150 steps a run is mostly warm-up and noise, and the first runs here have 1:" in shown
    assert "balance point: lambda = " in shown and "Balance point, at which" in shown
    verdict = json.loads((folder / "verdict.json").read_text())
    results = read_results(folder, "eval")
    assert verdict["comparison"]["num_seeds"] == 3 and verdict["comparison"]["num_rows"] == 20
    assert {name.split("seed")[1] for name in results} == {"5", "6", "7", "1005"}
    assert verdict["kind"] in ("recommended", "no difference", "not decided", "edge of the box")
    assert verdict["rates"] in (None, verdict["suggested"])
    run = load_config(folder / "suggestion.yaml")
    assert [run.optimizer.lr, run.train.seed, run.train.max_steps] == [verdict["suggested"][0], 5, 9]

    before = (folder / "verdict.json").read_bytes()
    (folder / "verdict.json").unlink()
    suggest(recipe, ["train.seed=5"], folder, Request(budget=17.0), balance=True, workers=2)
    assert (folder / "verdict.json").read_bytes() == before
