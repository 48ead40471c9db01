"""What is in a checkpoint, as far as no engine is needed: PEFT reads it, and an adapter comes back from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qvtune.checkpoint.engine import load_trained
from qvtune.checkpoint.state import TrainerState, load_trainer_state, require_base, require_sound, save
from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import load_whole

BASE = {"model.norm.weight": "bfloat16[64] 0123456789abcdef"}


def adapted(folder: Path, **section: Any) -> Any:
    base = load_whole(folder, ModelSection(quantization="none"), torch.float32)
    return add_adapters(base, AdapterSection(**section), str(folder), seed=0)


def randomize(model: nn.Module) -> None:
    for _, parameter in trainable(model):
        nn.init.normal_(parameter, std=0.1)


def save_checkpoint(model: Any, folder: Path, trainer: TrainerState | None = None) -> None:
    """Save with made-up optimizer tensors: the name's length, so that they can be told apart."""
    folder.mkdir(exist_ok=True)
    state = {
        name: {
            "value": parameter.detach().clone(),
            "master": parameter.detach() + 0.25,
            "exp_avg": torch.full_like(parameter, len(name)),
            "exp_avg_sq": torch.full_like(parameter, 1000 + len(name)),
        }
        for name, parameter in trainable(model)
    }
    peft_config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    save(folder, state, peft_config, trainer or TrainerState(), BASE)


def test_peft_reads_the_adapter_as_it_is(llama_fp32_folder: Path, tmp_path: Path) -> None:
    model = adapted(llama_fp32_folder, rank=5, alpha=15.0)
    randomize(model)
    save_checkpoint(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(llama_fp32_folder, dtype=torch.float32)
    input_ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        plain = base(input_ids=input_ids).logits
        peft = PeftModel.from_pretrained(base, tmp_path)(input_ids=input_ids).logits
        ours = model(input_ids=input_ids).logits
    assert (ours - plain).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(peft, ours, rtol=1e-5, atol=1e-5)


def test_the_optimizer_is_stored_by_parameter_name(llama_fp32_folder: Path, tmp_path: Path) -> None:
    model = adapted(llama_fp32_folder)
    save_checkpoint(model, tmp_path)
    stored = load_file(tmp_path / "optimizer.safetensors")
    assert len(stored) == 3 * len(trainable(model)) == 24
    for name, parameter in trainable(model):
        short = name.replace(".default.weight", ".weight")
        assert torch.equal(stored[f"master/{short}"], parameter + 0.25)
        assert stored[f"exp_avg/{short}"].unique().tolist() == [len(name)]
        assert stored[f"exp_avg_sq/{short}"].unique().tolist() == [1000 + len(name)]


@pytest.mark.parametrize(
    ("of", "spoil", "message"),
    [
        ("lora_A", lambda values: values.fill_(0), "value is all zero"),
        ("lora_A", lambda values: values[-1].fill_(float("inf")), "value is not finite"),
        ("lora_B", lambda values: values[0].fill_(float("nan")), "value is not finite"),
    ],
)
def test_training_cannot_go_on_from_everything(
    llama_fp32_folder: Path, of: str, spoil: Callable[[torch.Tensor], object], message: str
) -> None:
    model = adapted(llama_fp32_folder)
    require_sound({key: {"value": value.data} for key, value in trainable(model)}, step=0)  # every B is zero
    name, parameter = next(item for item in trainable(model) if of in item[0])
    spoil(parameter.data)
    state = {key: {"value": value.data} for key, value in trainable(model)}
    with pytest.raises(RuntimeError, match="step 7 is not saved") as caught:
        require_sound(state, step=7)
    assert f"{name}: {message}" in str(caught.value)


def test_the_counters_come_back(llama_fp32_folder: Path, tmp_path: Path) -> None:
    trainer = TrainerState(
        20, 4096, 1024, {0: {"loss": 3.5}, 20: {"loss": 2.25}}, {"train": {"seed": 0}, "task": "causal_lm"}
    )
    save_checkpoint(adapted(llama_fp32_folder), tmp_path, trainer)
    assert load_trainer_state(tmp_path) == trainer
    stored = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = {step: metrics["loss"] for step, metrics in stored.pop("evaluations").items()}
    (tmp_path / "trainer_state.json").write_text(json.dumps(stored | {"eval_losses": losses}))
    assert load_trainer_state(tmp_path) == trainer, "as it was written before tasks had other metrics"


def test_an_adapter_comes_back_bit_by_bit(llama_fp32_folder: Path, tmp_path: Path) -> None:
    source, target = adapted(llama_fp32_folder), adapted(llama_fp32_folder)
    randomize(source)
    save_checkpoint(source, tmp_path)
    load_trained(tmp_path, target)
    loaded = dict(trainable(target))
    for name, parameter in trainable(source):
        assert torch.equal(loaded[name], parameter)


def test_another_adapter_is_refused_with_all_differences(llama_fp32_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(adapted(llama_fp32_folder, projections=("q", "k")), tmp_path)
    with pytest.raises(UserError) as caught:
        load_trained(tmp_path, adapted(llama_fp32_folder, projections=("q", "v")))
    assert len(caught.value.problems) == 8  # two layers, two factors, v missing and k too many
    assert sum("v_proj" in problem and "is missing" in problem for problem in caught.value.problems) == 4
    assert sum("k_proj" in problem and "has no place" in problem for problem in caught.value.problems) == 4


def test_another_rank_is_refused_with_all_shapes(llama_fp32_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(adapted(llama_fp32_folder, rank=4), tmp_path)
    model = adapted(llama_fp32_folder, rank=8)
    before = {name: parameter.clone() for name, parameter in trainable(model)}
    with pytest.raises(UserError, match=r"has shape \[4, 64\], this run needs \[8, 64\] \(adapter\.rank\)") as caught:
        load_trained(tmp_path, model)
    assert len(caught.value.problems) == 8
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainable(model)), "nothing half-loaded"


def test_a_file_of_another_program_is_refused(llama_fp32_folder: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="weight has no place in this run's adapter"):
        load_trained(tmp_path, adapted(llama_fp32_folder))


def test_trained_matrices_are_stored_under_the_names_of_the_base(llama_fp32_folder: Path, tmp_path: Path) -> None:
    section = AdapterSection(method="full", projections=("q", "o"))
    source, target = (
        add_adapters(load_whole(llama_fp32_folder, ModelSection(), torch.float32, adapter=section), section, "", 0)
        for _ in range(2)
    )
    original = load_file(llama_fp32_folder / "model.safetensors")
    assert {name for name, _ in trainable(source)} == {
        f"model.layers.{layer}.self_attn.{matrix}_proj.weight" for layer in (0, 1) for matrix in ("q", "o")
    }
    assert all(torch.equal(parameter, original[name]) for name, parameter in trainable(source)), "not rounded to 4 bits"
    randomize(source)
    save_checkpoint(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trained.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "base.json",
    }
    stored = load_file(tmp_path / "trained.safetensors")
    assert stored.keys() == dict(trainable(source)).keys()
    load_trained(tmp_path, target)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in trainable(target))


def test_another_base_is_refused_by_tensor(llama_fp32_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(adapted(llama_fp32_folder), tmp_path)
    require_base(tmp_path, BASE)
    other = {"model.norm.weight": "bfloat16[64] fedcba9876543210", "lm_head.weight": "bfloat16[9, 64] 0000000000000000"}
    with pytest.raises(UserError) as caught:
        require_base(tmp_path, other)
    head, norm, advice = caught.value.problems
    assert "'lm_head.weight' is bfloat16[9, 64] 0000000000000000, expected none" in head
    assert "'model.norm.weight' is bfloat16[64] fedcba9876543210, expected bfloat16[64] 0123456789abcdef" in norm
    assert "was trained on another base" in advice
