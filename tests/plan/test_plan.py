"""The command's output for models of which there is a config.json, and what it refuses."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qvtune.config.schema import RunConfig
from qvtune.config.zero_stage import GIB, usable_bytes
from qvtune.errors import UserError
from qvtune.plan import advice as advice_module
from qvtune.plan import plan as module
from qvtune.plan.advice import Advice, advise, whole_base_bytes
from qvtune.plan.amount import amount_of
from qvtune.plan.gpus import GPUS
from qvtune.plan.memory import Costs
from qvtune.plan.plan import Request, estimate_of, plan, short_plan
from qvtune.plan.simulate import BASE, GATHERED, SAVED, TRAINED, Setup
from qvtune.plan.step_time import Cluster
from qvtune.train.data import load_data
from tests.plan.shapes import make_config_folder

GB = 10**9
REQUEST = Request(nodes=2, gpus_per_node=4, gpu="a100-40")


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """On a folder with nothing but the configuration of Llama 3 8B."""
    return config(make_config_folder(tmp_path / "model", "llama3_8b"))


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "run",
            "deepspeed": "zero3.json",
            "model": {"name_or_path": str(folder)},
            "data": {"train": "none.jsonl", "max_length": 1000},
            "train": {"epochs": 2, "global_batch_size": 16, "activation_checkpointing": True},
            **changes,
        }
    )


COSTS = Costs(
    peaks={"head": Counter({BASE: GB, SAVED: 3 * GB, GATHERED: GB})},
    persistent=0,
    gathered=4 * GB,
    gathered_in_node=0,
    operations=Counter({(10**13, 10**9): 100}),
    num_layers=32,
)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """What has been simulated; all of it costs ``COSTS``."""
    seen: list[Setup] = []

    def costs_of(setup: Setup, num_ranks: int) -> Costs:
        seen.append(setup)
        base = 5 * GB if setup.deepspeed_config["zero_optimization"]["stage"] == 2 else GB
        factor = 1 if setup.run.train.activation_checkpointing else 20
        peak = Counter({BASE: base, SAVED: factor * 3 * GB, GATHERED: GB if base == GB else 0})
        work = Counter({(10**13, 10**9): 100 if factor == 1 else 75})
        return replace(COSTS, peaks={"head": peak}, gathered=4 * GB if base == GB else 0, operations=work)

    monkeypatch.setattr(module, "costs_of", costs_of)
    monkeypatch.setattr(advice_module, "costs_of", costs_of)
    return seen


def test_everything_is_printed(run: RunConfig, simulated: list[Setup], capsys: pytest.CaptureFixture[str]) -> None:
    plan(run, replace(REQUEST, tokens=1_000_000), ["recipe.yaml", "train.epochs=2"])
    shown = capsys.readouterr().out
    for part in (
        "activations kept for backward",
        "the GPU: fits",
        "7.0 GB into each GPU a step",  # two micro-batches of seven eighths of 4 GB
        "adapters of 200 Gbit/s a node",
        "125 steps (--tokens 1,000,000, in full rows)",
        "Nothing of it was measured on a GPU",
        "Command  python launch/submit.py --nodes 2 --gpus-per-node 4 --config recipe.yaml train.epochs=2",
    ):
        assert part in shown, shown
    # Without checkpointing it does not fit, and a whole base needs no gathers.
    assert "zero2.json, train.micro_batch_size=1, with activation checkpointing" in shown
    assert shown.rstrip().endswith("deepspeed=zero2.json")
    assert {str(setup.dtype) for setup in simulated} == {"torch.bfloat16"}


def test_the_short_form(run: RunConfig, simulated: list[Setup]) -> None:
    lines = short_plan(run, REQUEST)
    assert len(lines) == 3 and len(simulated) == 1
    assert "of 39.0 GiB per GPU (fits): saved 2.8, base 0.9, gathered 0.9" in lines[0]
    assert lines[2].startswith("7.0 GB into each GPU a step") and "over one)" in lines[2]


@pytest.mark.parametrize(
    ("gpu", "stage", "checkpointing"),
    [("a100-40", "zero2.json", True), ("h100-80", "zero2.json", False), ("rtx-4090", "zero2.json", True)],
)
def test_advice_takes_what_is_fastest_and_fits(
    run: RunConfig, simulated: list[Setup], gpu: str, stage: str, checkpointing: bool
) -> None:
    """60 GB of activations without checkpointing, a whole base of 5 GB."""
    found = estimate_of(run, replace(REQUEST, gpu=gpu))
    advice = advise(found.setup, found.costs, Cluster(GPUS[gpu], 2, 4, 4))
    assert advice is not None and (advice.stage, advice.checkpointing) == (stage, checkpointing)
    expected = ["deepspeed=zero2.json"] + ([] if checkpointing else ["train.activation_checkpointing=false"])
    assert advice.overrides(run) == expected


@pytest.mark.parametrize(
    ("gpu", "nodes", "stage"),
    [
        ("h100-80", 1, "zero2.json"),
        ("rtx-4090", 1, "zero2.json"),
        ("tiny", 1, "zero3.json"),
        ("tiny", 2, "zero3_hpz.json"),
    ],
)
def test_auto_is_what_a_run_would_choose_there(
    run: RunConfig, simulated: list[Setup], monkeypatch: pytest.MonkeyPatch, gpu: str, nodes: int, stage: str
) -> None:
    """Llama 3 8B: a base of 5.3 GiB. Nothing is simulated to choose."""
    monkeypatch.setitem(GPUS, "tiny", replace(GPUS["rtx-4090"], memory=8 * GIB))
    run = run.model_copy(update={"deepspeed": "auto"})
    first, *lines = short_plan(run, Request(nodes, 4, gpu))
    (setup,) = simulated
    assert first.startswith(f"{stage}: base ") and f"of {usable_bytes(GPUS[gpu].memory) / GIB:.1f} GiB usable" in first
    assert setup.run.deepspeed == stage and len(lines) == 3
    zero = setup.deepspeed_config["zero_optimization"]
    assert zero["stage"] == (2 if stage == "zero2.json" else 3)
    assert zero.get("zero_hpz_partition_size") == (4 if stage == "zero3_hpz.json" else None)


def test_what_is_advised_already_changes_nothing(run: RunConfig) -> None:
    assert Advice("zero3.json", 1, True, 1.0, "").overrides(run) == []
    assert Advice("zero3.json", 2, True, 1.0, "").overrides(run) == ["train.micro_batch_size=2"]


def test_a_model_that_is_not_here_needs_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"model.name_or_path: 'owner/none' .* `hf download owner/none config.json`"):
        estimate_of(config(Path("owner/none")), REQUEST)


def test_classification_is_simulated_with_its_head(tmp_path: Path) -> None:
    """A small RoBERTa: what is trained is q, v and the head; ``classification.labels`` says how many outputs."""
    folder = make_config_folder(tmp_path / "model", "roberta_base")
    values = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(values | sizes | {"vocab_size": 1000}))
    sections = {
        "deepspeed": "zero2.json",
        "task": "sequence_classification",
        "classification": {"labels": ["a", "b", "c"]},
        "adapter": {"rank": 4},
        "data": {"train": "none.jsonl", "max_length": 128, "packing": False},
        "train": {"max_steps": 7, "global_batch_size": 16, "micro_batch_size": 8},
    }
    run = config(folder, **sections, model={"name_or_path": str(folder), "quantization": "none"})
    found = estimate_of(run, replace(REQUEST, nodes=1, gpus_per_node=2))
    head = 64 * 64 + 64 + 64 * 3 + 3
    # bfloat16 values; float32 masters and two moments on one of two ranks; gradients, buffers and padding come on top
    least = (2 * 2 * 2 * 4 * 64 + head) * (2 + 12 / 2)
    assert least < found.costs.peak[TRAINED] < 4 * least
    base = (1000 + 514 + 1) * 64 + 2 * (4 * (64 * 64 + 64) + 2 * 64 * 96 + 96 + 64 + 4 * 64) + 2 * 64
    assert whole_base_bytes(found.setup) == 2 * base
    assert base * 2 <= found.costs.peak[BASE] < 2.2 * base  # and buffers of positions
    operations = sum(flop * count for (flop, _), count in found.costs.operations.items())
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 96)
    # forward, and backward to the activations, of 8 rows; the factors, and the attention itself, take the rest
    assert 4 * 8 * 128 * matrices * 0.8 < operations < 4 * 8 * 128 * matrices * 2


def test_a_batch_that_cannot_be_split_is_refused(run: RunConfig) -> None:
    with pytest.raises(UserError, match="cannot be split"):
        estimate_of(run, replace(REQUEST, gpus_per_node=5))


def test_the_length_of_a_run(llama_folder: Path, tmp_path: Path, run: RunConfig) -> None:
    """``--tokens``, the rows that were tokenized, ``max_steps``, or not known: in this order."""
    folder = Path(run.model.name_or_path)
    found = amount_of(run, folder, 1_000_000)
    assert (found.steps, found.tokens_per_step) == (2 * 1000 // 16, 16_000)
    unknown = amount_of(run, folder, None)
    assert unknown.steps is None and "give --tokens" in unknown.source
    limited = config(folder, train={"max_steps": 7, "global_batch_size": 16})
    assert amount_of(limited, folder, None).steps == 7 and "max_steps" in amount_of(limited, folder, None).source
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "what", "completion": " it does"}) + "\n") * 40)
    real = config(llama_folder, data={"train": str(rows), "max_length": 64})
    assert amount_of(real, llama_folder, None).steps is None, "looks, and tokenizes nothing"
    tokenized = load_data(real).rows["data.train"]
    known = amount_of(real, llama_folder, None)
    assert f"{len(tokenized):,} rows" in known.source
    assert known.tokens_per_step == pytest.approx(16 * tokenized.num_tokens.sum() / len(tokenized))
