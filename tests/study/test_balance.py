"""The balance point on tiny models."""

import json
import math
from pathlib import Path

import pytest
import torch

from qvtune.config.schema import OptimizerSection, RunConfig
from qvtune.data.batch import Batch
from qvtune.model.adapters import add_adapters, group_and_factor, trainable
from qvtune.model.loader import load_whole
from qvtune.study import balance as module
from qvtune.study.balance import balance_point, measure_balance
from qvtune.tasks import get_task
from tests.support.tiny import make_model_folder, make_row

OPTIMIZER = OptimizerSection(lr=1e-6)  # so small that changes are proportional to it


def run_of(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(folder.parent / "run"),
            "model": {"name_or_path": str(folder), "quantization": "none", "dtype": "float32", "attention": "sdpa"},
            "adapter": {"projections": ["q", "k", "v"], "rank": 4, "alpha": 8},
            "optimizer": {"lr": 1e-6},
            "data": {"max_length": 64},
            "train": {"max_steps": 2, "global_batch_size": 8},
        }
    )


@pytest.fixture
def objective(llama_fp32_folder: Path) -> torch.nn.Module:
    run = run_of(llama_fp32_folder)
    base = load_whole(llama_fp32_folder, run.model, torch.float32, "sdpa")
    return get_task("causal_lm").objective(add_adapters(base, run.adapter, "base", 0))


@pytest.fixture
def batches() -> list[Batch]:
    task = get_task("causal_lm")
    return [task.collate([make_row(24, 16, seed=seed) for seed in (n, n + 1)], 0) for n in range(0, 8, 2)]


def test_at_the_balance_point_both_sides_change_the_output_equally(
    objective: torch.nn.Module, batches: list[Batch]
) -> None:
    """Train v at lambda times the rate: the geometric mean of the changes is that of q and k."""
    parameters = dict(trainable(objective))
    before = {name: one.detach().clone() for name, one in parameters.items()}
    found = balance_point(objective, [batches[:2], batches[2:]], batches[0], OPTIMIZER)
    assert all(torch.equal(one, before[name]) for name, one in parameters.items()), "set back"

    changes = {}
    names = list(parameters)
    start = module._attention_outputs(objective, names, batches[0])
    for side, rate in (("qk", 1.0), ("v", found)):
        section = OPTIMIZER.model_copy(update={"lr": OPTIMIZER.lr * rate})
        trained = module._trained(objective, parameters, [batches[:2], batches[2:]], section)
        of_side = {
            name: value for name, value in trained.items() if (group_and_factor(name)[0] == "v") == (side == "v")
        }
        module._set(parameters, {**before, **of_side})
        after = module._attention_outputs(objective, names, batches[0])
        changes[side] = [math.log((one - old).norm().item()) for one, old in zip(after, start, strict=True)]
        module._set(parameters, before)
    assert len(start) == 2, "one of each layer"
    assert sum(changes["qk"]) == pytest.approx(sum(changes["v"]), abs=0.05)


def test_of_a_recipe(llama_fp32_folder: Path) -> None:
    """The embedded data; the same every time."""
    run = run_of(llama_fp32_folder)
    found = measure_balance(run)
    assert 0 < found < math.inf and measure_balance(run) == found


def test_of_a_classifier(tmp_path: Path) -> None:
    """Its attention modules are others, and its head is not trained here."""
    rows = tmp_path / "rows.jsonl"
    texts = ("it does what the name says", "what does it do in Python")
    lines = [json.dumps({"text": texts[label], "label": str(label)}) for label in (0, 1)] * 20
    rows.write_text("\n".join(lines) + "\n")
    folder = make_model_folder(tmp_path / "bert", "bert")
    run = run_of(folder)
    changed = {"task": "sequence_classification", "data": {"train": str(rows), "max_length": 32}}
    found = measure_balance(
        RunConfig.model_validate(run.model_dump(exclude={"classification", "task", "data"}) | changed)
    )
    assert 0 < found < math.inf
