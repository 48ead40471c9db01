"""What ``deepspeed: auto`` estimates from shapes, held against simulations: never less, and not much more."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from qvtune.config.schema import RunConfig
from qvtune.plan.memory import costs_of
from qvtune.plan.plan import Request, setup_of
from qvtune.plan.simulate import BASE, GATHERED, adapted_model, model_of
from qvtune.train.step_memory import step_memory
from tests.plan.shapes import make_config_folder

pytestmark = pytest.mark.slow
NUM_RANKS = 8
ALL = ("q", "k", "v", "o", "gate", "up", "down")
CLASSES = {"task": "sequence_classification", "classification": {"labels": ["a", "b"]}}
# With more norms in a layer.
GEMMA = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("shapes", "stage", "checkpointing", "changes", "at_most"),
    [
        ("llama3_8b", "zero3", True, {}, 1.25),
        ("llama3_8b", "zero2", False, {"adapter": {"method": "dora", "projections": ALL, "dropout": 0.1}}, 1.25),
        ("gemma3", "zero2", False, {}, 2),
        ("roberta_base", "zero2", False, CLASSES, 2),
    ],
)
def test_the_estimate_is_on_the_safe_side(
    tmp_path: Path, shapes: str, stage: str, checkpointing: bool, changes: dict[str, Any], at_most: float
) -> None:
    folder = tmp_path / "model"
    if shapes == "gemma3":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(Gemma3TextConfig(**GEMMA).to_dict()))
    else:
        make_config_folder(folder, shapes)
    run = RunConfig.model_validate(
        {
            "run_dir": "run",
            "deepspeed": f"{stage}.json",
            "model": {"name_or_path": str(folder)},
            "data": {"train": "none.jsonl", "max_length": 512 if shapes == "roberta_base" else 2048},
            "train": {"max_steps": 1, "global_batch_size": NUM_RANKS, "activation_checkpointing": checkpointing},
            **changes,
        }
    )
    setup, _ = setup_of(run, Request(1, NUM_RANKS, "h100-80").cluster())
    estimated = step_memory(run, adapted_model(model_of(setup)[0], run), setup.model_config, setup.dtype)
    costs = costs_of(setup, NUM_RANKS)
    other = max(
        sum(size for cause, size in peak.items() if cause not in (BASE, GATHERED)) for peak in costs.peaks.values()
    )
    assert other < estimated.other_bytes(NUM_RANKS) < at_most * other
    if stage == "zero2":
        assert estimated.base == pytest.approx(costs.peak[BASE], rel=0.02)
    else:
        gathered = max(peak[GATHERED] for peak in costs.peaks.values())
        assert gathered < estimated.gathered < at_most * gathered
