"""From somebody else's adapter to an ordinary folder: converted, proved, loaded with plain transformers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.convert.convert import convert
from qvtune.convert.sources.source import open_source
from qvtune.errors import UserError
from qvtune.model.quantize import quantize
from tests.convert.conftest import MakeRun
from tests.convert.foreign import assert_same, merged_by_peft, save_adapter
from tests.support.tiny import VOCABULARY, make_model_folder, make_tokenizer

LM, CLASSIFIER = AutoModelForCausalLM, AutoModelForSequenceClassification
QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make_gpt2(path: Path) -> Path:
    """An architecture that is in no table of ours, with old buffers of integers and masks in its file."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=256, vocab_size=VOCABULARY, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "position_ids": torch.arange(9)}
    save_file(tensors | old, path / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(path)
    return path


def make_llama(path: Path) -> Path:
    return make_model_folder(path, dtype=torch.float32)


def make_tied(path: Path) -> Path:
    return make_model_folder(path, dtype=torch.float32, tie=True)


CASES: dict[str, tuple[Callable[[Path], Path], Any, dict[str, Any]]] = {
    "dora, norms, head": (make_llama, LM, QV | {"use_dora": True, "modules_to_save": ["lm_head", "norm"]}),
    "tokens": (make_tied, LM, QV | {"trainable_token_indices": [4, 77]}),
    "untied": (make_tied, LM, QV | {"target_modules": ["v_proj", "embed_tokens"]}),
    "gpt2": (make_gpt2, LM, {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True, "use_dora": True}),
    "classifier": (make_llama, CLASSIFIER, QV | {"task_type": "SEQ_CLS"}),
    "token classifier": (make_llama, AutoModelForTokenClassification, QV | {"task_type": "TOKEN_CLS"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_base_and_adapter_compute(tmp_path: Path, case: str) -> None:
    make, architecture, settings = CASES[case]
    base, options = make(tmp_path / "base"), {"num_labels": 3} if settings.get("task_type", "").endswith("CLS") else {}
    adapter = save_adapter(base, tmp_path / "adapter", architecture, options=options, **settings)
    report = convert(adapter, tmp_path / "merged")
    assert report.proof.top1_agreement == 1.0 and report.proof.max_abs_difference < 1e-4
    merged, info = architecture.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "mismatched_keys"))
    trained = PeftModel.from_pretrained(architecture.from_pretrained(base, **options), adapter).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
    if case == "gpt2":  # what nobody touches is there, of whatever type
        assert load_file(tmp_path / "merged" / "model.safetensors")["position_ids"].dtype == torch.int64


def test_auto_is_the_dtype_of_the_base_and_others_have_short_names(llama_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_folder, tmp_path / "adapter", LM, **QV)
    assert convert(adapter, tmp_path / "auto").dtype == "bfloat16"
    assert convert(adapter, tmp_path / "fp16", dtype="fp16").dtype == "float16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "auto" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_goes_onto_nf4_where_the_user_says_that_it_was_trained_so(
    llama_folder: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(llama_folder, tmp_path / "adapter", LM, **QV)
    report = convert(adapter, tmp_path / "dequantized", base_weights="dequantized")
    assert (report.base_weights, report.trained_on) == ("dequantized", "nf4")
    quantize(llama_folder, tmp_path / "nf4")
    from_nf4 = convert(adapter, tmp_path / "from-nf4", base=str(tmp_path / "nf4"))
    assert from_nf4.base_weights == "dequantized"
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("from-nf4", "dequantized"))
    assert_same(found, expected, tolerance=0)


def test_another_place_of_the_base(llama_fp32_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **QV)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    convert(adapter, tmp_path / "merged", base=str(llama_fp32_folder))
    expected = merged_by_peft(llama_fp32_folder, adapter, LM).state_dict()
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_a_base_packed_by_others_is_refused(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", LM, **QV)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"quantized by 'gptq'.*--base"):
        convert(adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def as_full(run: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The run's checkpoint as ``adapter.method: full`` has it."""
    old = checkpoint_folder.resolve(run)

    def write(folder: Path) -> None:
        for name in ("trainer_state.json", "base.json"):
            (folder / name).write_bytes((old / name).read_bytes())
        save_file(tensors, folder / "trained.safetensors")

    checkpoint_folder.write(run / "checkpoints", 4, write)
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_parameter_checkpoints(make_run: MakeRun, llama_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = load_file(llama_folder / "model.safetensors")
    names = [name for name in base if "q_proj" in name or "v_proj" in name]
    trained = {name: (base[name].float() + 0.1 * torch.randn(base[name].shape)).to(dtype) for name in names}
    run = as_full(make_run(llama_folder, quantization="none"), trained)
    report = convert(run, tmp_path / "merged")
    assert (report.tensors["adapted"], report.step, report.dtype) == (4, 3, str(dtype).removeprefix("torch."))
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), base | trained, tolerance=0)


def test_full_parameter_checkpoints_that_do_not_fit(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    run = as_full(make_run(llama_folder, quantization="none"), {name: torch.ones(2, 3), "other": torch.ones(1)})
    with pytest.raises(UserError) as caught:
        convert(run, tmp_path / "merged")
    assert "has shape [2, 3], the base needs [64, 64]" in str(caught.value)
    assert "other [1] has no place in the base" in str(caught.value)
    run = as_full(make_run(llama_folder, quantization="none"), {name: torch.full((64, 64), torch.nan)})
    with pytest.raises(UserError, match=r"q_proj\.weight holds values that are not finite"):
        convert(run, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_checkpoints_of_ours_by_each_of_their_names(make_run: MakeRun, llama_folder: Path) -> None:
    run = make_run(llama_folder)
    (run / "checkpoints" / "best").symlink_to("step-00000003")
    for name in ("", "checkpoints", "checkpoints/latest", "checkpoints/best", "checkpoints/step-00000003"):
        source = open_source(run / name)
        assert (source.kind, source.step, source.path.name) == ("checkpoint", 3, "step-00000003")
        assert source.fingerprint and source.state
    assert open_source(run, base="elsewhere").model.name_or_path == "elsewhere"


def test_what_is_no_checkpoint_is_refused_with_the_reason(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trainer" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir(parents=True)
    for path, problem in {
        tmp_path / "nowhere": "nothing of this name",
        tmp_path / "trainer": "holds several checkpoints; give one of them: checkpoint-20",
        tmp_path / "trainer" / "checkpoint-20": "no checkpoint; give a folder",
        tmp_path / "fsdp": "an FSDP checkpoint cannot be converted",
        llama_folder: "is a model without an adapter",
    }.items():
        with pytest.raises(UserError, match=problem):
            open_source(path)


@pytest.mark.usefixtures("_no_deepspeed")
def test_zero_checkpoints_are_proved_as_the_others(llama_fp32_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_fp32_folder, tmp_path / "checkpoint-5", LM, **QV)
    stored = load_file(adapter / "adapter_model.safetensors")
    names = {key.replace(".weight", ".default.weight"): tensor for key, tensor in stored.items()}
    step = adapter / "global_step5"
    step.mkdir()
    flat = torch.cat([tensor.flatten() for tensor in names.values()])
    for rank, part in enumerate(flat.chunk(2)):
        state = {"partition_count": [2], "single_partition_of_fp32_groups": [part.clone()]}
        torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes = {name: tensor.shape for name, tensor in names.items()}
    torch.save({"param_shapes": [shapes], "global_steps": 5}, step / "mp_rank_00_model_states.pt")
    (adapter / "adapter_model.safetensors").unlink()
    report = convert(adapter, tmp_path / "merged", allow_pickle=True)
    assert (report.step, report.tensors["adapted"], report.proof.top1_agreement) == (5, 4, 1.0)


@pytest.fixture
def _no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
