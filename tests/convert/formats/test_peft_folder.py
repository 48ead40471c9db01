"""``--format adapter``: the folder must be what PEFT itself would have saved, wherever the tensors came from."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qvtune.config.schema import ModelSection
from qvtune.convert.convert import convert
from qvtune.convert.formats import peft_folder
from qvtune.convert.merge.base import open_merge_base
from qvtune.errors import ProofError, UserError
from tests.convert.conftest import MakeRun
from tests.convert.foreign import save_adapter
from tests.support.tiny import make_model_folder

V_PROJ = "model.layers.0.self_attn.v_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
to_adapter = partial(convert, format="adapter")
Tensors = dict[str, torch.Tensor]


def assert_same_file(found: Path, expected: Path) -> None:
    """The same names and values as another adapter's file."""
    ours, theirs = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def logits(base: Path, adapter: Path, architecture: Any = AutoModelForCausalLM) -> torch.Tensor:
    """By plain PEFT."""
    model = PeftModel.from_pretrained(architecture.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return found


def test_a_checkpoint_becomes_a_clean_folder_that_plain_peft_loads(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    run = make_run(llama_folder, method="rslora")
    report = to_adapter(run, tmp_path / "out")
    checkpoint = run / "checkpoints" / "latest"
    ours = {WEIGHTS, CONFIG, "README.md", "merge_report.json"}
    of_a_server = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == ours | of_a_server
    assert_same_file(tmp_path / "out", checkpoint)
    assert torch.equal(logits(llama_folder, tmp_path / "out"), logits(llama_folder, checkpoint))
    assert not torch.allclose(
        logits(llama_folder, tmp_path / "out"), logits(llama_folder, _zeroed(checkpoint, tmp_path))
    )
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert list(config) == sorted(config)
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(llama_folder), True)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert report.format == "adapter"
    assert report.proof.top1_agreement == 1.0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base_weights", "quantization"), [("dequantized", "nf4"), ("original", "none")])
def test_what_its_card_says_loads_it_on_the_weights_that_were_chosen(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base_weights: Any,
    quantization: Any,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> None:
    folder = make_model_folder(tmp_path / "base", dtype=stored)
    to_adapter(make_run(folder, dtype=dtype), tmp_path / "out", base_weights=base_weights)
    card = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    loaded: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], loaded)
    layer = loaded["model"].get_submodule(f"base_model.model.{V_PROJ}.base_layer")
    found = layer.weight.data
    if base_weights == "dequantized":
        assert layer.compute_dtype == dtype
        found = dequantize_4bit(found, layer.weight.quant_state)
    base = open_merge_base(folder, ModelSection(quantization=quantization), dtype)
    assert torch.equal(found.flatten().to(dtype), base.reader(f"{V_PROJ}.weight")(0, found.numel()).to(dtype))


def _zeroed(adapter: Path, tmp_path: Path) -> Path:
    """The same adapter without effect: what a comparison must tell from it."""
    folder = tmp_path / "zeroed"
    folder.mkdir()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text((adapter / CONFIG).read_text())
    return folder


def as_deepspeed_names(tensors: Tensors) -> Tensors:
    """Names as they stand in the model, with the adapter's name and all wrappers."""
    renamed = {}
    for name, tensor in tensors.items():
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            name = name.replace(f".{part}", f".{part}.default")
        if name.endswith("lora_magnitude_vector"):
            name += ".default.weight"
        if name.endswith(("score.weight", "lm_head.weight")) and ".lora_" not in name:
            name = name.replace(".weight", ".modules_to_save.default.weight")
        renamed[f"module.{name}"] = tensor
    return renamed


def without_base_layers(tensors: Tensors) -> Tensors:
    """As PEFT before 0.7 named trained biases."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("settings", "rename"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, as_deepspeed_names),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}, as_deepspeed_names),
        ({"target_modules": ["v_proj"], "bias": "lora_only"}, without_base_layers),
        ({"target_modules": ["v_proj"], "bias": "all"}, without_base_layers),
        ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, as_deepspeed_names),
        ({"target_modules": ["v_proj"], "trainable_token_indices": [5, 9]}, dict),
        ({"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}}, dict),
    ],
)
def test_names_of_all_times_become_todays(
    tmp_path: Path, settings: dict[str, Any], rename: Callable[[Tensors], Tensors]
) -> None:
    base = make_model_folder(tmp_path / "base", "qwen2", dtype=torch.float32)
    expected = save_adapter(base, tmp_path / "expected", AutoModelForCausalLM, r=4, task_type="CAUSAL_LM", **settings)
    old = tmp_path / "old"
    old.mkdir()
    tensors = load_file(expected / WEIGHTS)
    torch.save(rename(tensors), old / "adapter_model.bin")
    config = json.loads((expected / CONFIG).read_text())
    kept = {"peft_type", "r", "lora_alpha", "task_type", "base_model_name_or_path", "fan_in_fan_out", *settings}
    (old / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name in kept}))
    to_adapter(old, tmp_path / "out", allow_pickle=True)
    assert_same_file(tmp_path / "out", expected)
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, expected))


def test_heads_go_with_it(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    options = {"num_labels": 3}
    classifier = partial(AutoModelForSequenceClassification.from_pretrained, **options)
    expected = save_adapter(
        base, tmp_path / "expected", AutoModelForSequenceClassification, r=4, task_type="SEQ_CLS", options=options
    )
    to_adapter(expected, tmp_path / "out")
    assert_same_file(tmp_path / "out", expected)
    assert any(name.endswith("score.weight") for name in load_file(tmp_path / "out" / WEIGHTS))
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        found, wanted = (
            PeftModel.from_pretrained(classifier(base), folder).eval()(input_ids=ids).logits
            for folder in (tmp_path / "out", expected)
        )
    assert torch.equal(found, wanted)


def test_deepspeeds_masters_are_what_is_written(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", dtype=torch.float32)
    expected = save_adapter(
        base,
        tmp_path / "expected",
        AutoModelForCausalLM,
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
    )
    masters = as_deepspeed_names(load_file(expected / WEIGHTS))
    step = tmp_path / "trainer" / "global_step7"
    step.mkdir(parents=True)
    flat = torch.cat([tensor.flatten() for tensor in masters.values()])
    optimizer = {"single_partition_of_fp32_groups": [flat], "partition_count": 1}
    torch.save({"optimizer_state_dict": optimizer}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    shapes = {name.removeprefix("module."): list(tensor.shape) for name, tensor in masters.items()}
    torch.save({"param_shapes": [shapes], "global_steps": 7, "module": {}}, step / "mp_rank_00_model_states.pt")
    (tmp_path / "trainer" / CONFIG).write_text((expected / CONFIG).read_text())
    report = to_adapter(tmp_path / "trainer", tmp_path / "out", allow_pickle=True)
    assert report.step == 7
    assert_same_file(tmp_path / "out", expected)


def test_another_base_than_the_checkpoints_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(make_model_folder(tmp_path / "base"))
    other = make_model_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained on another base"):
        to_adapter(run, tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_trained_matrices_and_a_new_dtype_are_refused(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(llama_folder)
    with pytest.raises(UserError, match="keeps the dtype"):
        to_adapter(run, tmp_path / "out", dtype="bf16")
    checkpoint = (run / "checkpoints" / "latest").resolve()
    from dataclasses import replace

    from qvtune.convert.conversion import open_conversion
    from qvtune.convert.sources.source import open_source

    conversion = open_conversion(open_source(checkpoint), None, "auto")
    with pytest.raises(UserError, match="matrices that were trained themselves"):
        peft_folder.require(replace(conversion, source=replace(conversion.source, saved=None)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["value", "name", "scaling"])
def test_a_folder_that_peft_would_read_otherwise_does_not_appear(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def save_otherwise(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
        name = next(name for name in tensors if "v_proj.lora_B" in name)
        if fault == "value":
            tensors[name][0, 0] += 1e-4
        if fault == "name":
            tensors[name.replace("lora_B", "lora_B.default")] = tensors.pop(name)
        save_file(tensors, file, metadata)

    run = make_run(llama_folder)
    monkeypatch.setattr(peft_folder, "save_file", save_otherwise)
    if fault == "scaling":
        as_json = peft_folder._as_json
        monkeypatch.setattr(peft_folder, "_as_json", lambda config: as_json(config) | {"lora_alpha": 6.1})
    with pytest.raises(ProofError, match=r"v_proj.*(PEFT has|PEFT scales)"):
        to_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
