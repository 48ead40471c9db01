"""bfloat16, the dtype of GPUs: what the other modules here show in float32, on 2 and 3 ranks, under every stage.

A CPU multiplies in bfloat16 twenty times slower; the models are tiny.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qvtune.convert.convert import convert
from tests.distributed import reference
from tests.distributed.conftest import STOP, Results, base, hpz_json, launch, train
from tests.support.lab import MAX_STEPS, Lab
from tests.support.tiny import four_bit_config

STAGES = ("zero2", "zero3", "zero3_hpz", "zero3_offload")
# 8 bits of a number: each loss is a mean of some hundred numbers that are rounded to them, relative to its value.
ROUNDING = 2e-3


def settings(lab: Lab, stage: str, num_ranks: int) -> dict[str, Any]:
    """What a run changes."""
    file = str(hpz_json(lab, num_ranks)) if stage == "zero3_hpz" else f"{stage}.json"
    return {"model__dtype": "bfloat16", "deepspeed": file}


@pytest.fixture(scope="module")
def two_ranks(lab: Lab) -> Results:
    """Whole runs, and runs that are stopped and go on; the last one does so on three ranks."""
    jobs = [base(lab, "bf16-base", model__dtype="bfloat16")]
    for stage in STAGES:
        changes = settings(lab, stage, 2)
        jobs += [
            train(lab, f"bf16-{stage}", **changes),
            train(lab, f"bf16-stopped-{stage}", **changes, **STOP),
            {**train(lab, f"bf16-stopped-{stage}", **changes), "name": f"bf16-continued-{stage}"},
        ]
    jobs.append(train(lab, "bf16-stopped", **settings(lab, "zero3", 2), **STOP))
    results = launch(lab, "bf16-two", 2, jobs)
    for stage in STAGES:
        lab.copy_run("bf16-stopped", f"bf16-three-{stage}")
    return results


@pytest.fixture(scope="module")
def three_ranks(lab: Lab, two_ranks: Results) -> Results:
    """Under each stage a run goes on that was stopped on 2 ranks under zero3."""
    jobs = [base(lab, "bf16-base", model__dtype="bfloat16")]
    jobs += [train(lab, f"bf16-three-{stage}", **settings(lab, stage, 3)) for stage in STAGES]
    return launch(lab, "bf16-three", 3, jobs)


@pytest.fixture(scope="module")
def expected(lab: Lab) -> list[float]:
    """Losses of an independent loop in float32."""
    return reference.train(lab, reference.adapted_model(lab.folder / "model"))[0]


def test_the_base_is_bit_equal_to_whole_tensors(two_ranks: Results, three_ranks: Results) -> None:
    for results in (two_ranks, three_ranks):
        for result in results:
            assert result["bf16-base"]["different"] == []
            assert len(result["bf16-base"]["checked"]) == 4 * 7 * 2 + 2 + 2 * 2 + 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_are_those_of_an_independent_loop(
    lab: Lab, two_ranks: Results, expected: list[float], stage: str
) -> None:
    assert [result[f"bf16-{stage}"] for result in two_ranks] == [{"code": 0}] * 2
    assert lab.losses(f"bf16-{stage}") == pytest.approx(expected, rel=ROUNDING)
    assert lab.losses(f"bf16-{stage}") != pytest.approx(expected, rel=1e-6), "it was not float32"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_compute_the_same_first_loss(lab: Lab, two_ranks: Results, stage: str) -> None:
    """Of the same bytes: where they are kept changes nothing."""
    assert lab.losses(f"bf16-{stage}")[0] == lab.losses("bf16-zero3")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_exactly(lab: Lab, two_ranks: Results, stage: str) -> None:
    assert [result[f"bf16-stopped-{stage}"] for result in two_ranks] == [{"code": 75}] * 2
    assert [result[f"bf16-continued-{stage}"] for result in two_ranks] == [{"code": 0}] * 2
    name = f"bf16-stopped-{stage}"
    assert [entry["step"] for entry in lab.events(name, "step")] == list(range(1, MAX_STEPS + 1))
    assert lab.losses(name) == lab.losses(f"bf16-{stage}")
    assert lab.grad_norms(name) == lab.grad_norms(f"bf16-{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_more_ranks_under_another_stage(
    lab: Lab, two_ranks: Results, three_ranks: Results, stage: str
) -> None:
    name = f"bf16-three-{stage}"
    assert [result[name] for result in three_ranks] == [{"code": 0}] * 3
    assert [entry["world_size"] for entry in lab.events(name, "run_start")] == [2, 3]
    assert lab.losses(name)[:3] == lab.losses("bf16-zero3")[:3]
    assert lab.losses(name) == pytest.approx(lab.losses("bf16-zero3"), rel=ROUNDING)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_has_masters_in_float32_and_what_forward_used(lab: Lab, two_ranks: Results, stage: str) -> None:
    checkpoint = lab.run_dir(f"bf16-{stage}") / "checkpoints" / "latest"
    adapter, state = (
        load_file(checkpoint / "adapter_model.safetensors"),
        load_file(checkpoint / "optimizer.safetensors"),
    )
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    masters = {name: tensor for name, tensor in state.items() if "master" in name}
    assert len(masters) == len(adapter) == 8
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values()), (
        "they are not rounded"
    )
    model = AutoModelForCausalLM.from_pretrained(
        lab.folder / "model", dtype=torch.bfloat16, quantization_config=four_bit_config()
    )
    PeftModel.from_pretrained(model, checkpoint)


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_merged_with_proof(
    lab: Lab, two_ranks: Results, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVTUNE_CACHE", str(lab.folder / "cache"))
    report = convert(lab.run_dir(f"bf16-{stage}") / "checkpoints" / "latest", tmp_path / "merged")
    assert report.dtype == "bfloat16"
    assert report.proof.passed
