import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.convert.convert import convert
from qvtune.convert.merge import changes as adapter
from qvtune.errors import ProofError, UserError
from tests.convert.conftest import MakeRun, State
from tests.support.tiny import make_model_folder

CONVERT = Path(__file__).parents[2] / "launch" / "convert.py"
V_PROJ = "base_model.model.model.layers.1.self_attn.v_proj"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merged_by_peft(base: Path, checkpoint: Path, *, nf4: bool, double_quant: bool, dtype: torch.dtype) -> State:
    """PEFT's merge in fp32, into what bitsandbytes makes of whole matrices, cast to ``dtype`` at the end."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in model.named_modules():
        if nf4 and isinstance(module, nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=double_quant
            )
            state.dtype = dtype
            module.weight.data = bnb.dequantize_4bit(codes, state).float()
    merged = PeftModel.from_pretrained(model, checkpoint, autocast_adapter_dtype=True).merge_and_unload()
    return {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}


def assert_equal_to_peft(merged: Path, expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    found = tensors_of(merged)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.to(expected[name].dtype),
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=partial("{}: {}".format, name),
        )


@pytest.mark.parametrize(
    ("quantization", "double_quant", "method"),
    [("nf4", True, "lora"), ("nf4", False, "rslora"), ("none", True, "lora"), ("none", True, "rslora")],
)
def test_merged_equals_pefts_merge(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, quantization: str, double_quant: bool, method: str
) -> None:
    run = make_run(llama_folder, quantization=quantization, double_quant=double_quant, method=method)
    report = convert(run, tmp_path / "merged")
    expected = merged_by_peft(
        llama_folder,
        run / "checkpoints/latest",
        nf4=quantization == "nf4",
        double_quant=double_quant,
        dtype=torch.float32,
    )
    assert_equal_to_peft(tmp_path / "merged", expected)
    assert report.base_weights == ("dequantized" if quantization == "nf4" else "original")
    assert report.scaling == pytest.approx(6 / 4 if method == "lora" else 6 / 2)
    assert report.proof.top1_agreement == 1.0
    assert report.proof.max_abs_difference < 1e-4


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "projections": ["q", "k", "v", "o", "gate", "up", "down"]},
        {"rank": 4, "projections": ["q", "gate", "down"], "method": "dora"},
        {"projections": ["k", "v", "up", "down"], "method": "ia3"},
    ],
    ids=lambda adapter: adapter.get("method", "lora"),
)
def test_all_projections_of_a_model_with_biases_are_merged_as_by_peft(
    make_run: MakeRun, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    """And written as an adapter that PEFT reads."""
    base = make_model_folder(tmp_path / "base", "qwen2")
    run = make_run(base, adapter=adapter)
    report = convert(run, tmp_path / "merged")
    expected = merged_by_peft(base, run / "checkpoints/latest", nf4=True, double_quant=True, dtype=torch.float32)
    assert_equal_to_peft(tmp_path / "merged", expected)
    assert report.proof.passed
    assert convert(run, tmp_path / "adapter", format="adapter").proof.passed


def test_biases_and_tensors_of_other_families_stay(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", "qwen2")
    run = make_run(base)
    convert(run, tmp_path / "merged")
    expected = merged_by_peft(base, run / "checkpoints/latest", nf4=True, double_quant=True, dtype=torch.float32)
    assert any(name.endswith("q_proj.bias") for name in expected)
    assert_equal_to_peft(tmp_path / "merged", expected)


def test_weights_of_a_16_bit_run_are_those_of_its_training(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    run = make_run(llama_folder, dtype=torch.bfloat16)
    report = convert(run, tmp_path / "merged")
    assert report.dtype == "bfloat16"
    expected = merged_by_peft(
        llama_folder, run / "checkpoints/latest", nf4=True, double_quant=True, dtype=torch.bfloat16
    )
    # One unit in the last place: PEFT multiplies by the scaling in another order.
    assert_equal_to_peft(tmp_path / "merged", expected, tolerance=2**-8)
    in_float32 = convert(run, tmp_path / "float32", dtype="float32")
    assert in_float32.proof.limits.top1_agreement == 1.0  # nothing is rounded, so nothing is forgiven
    assert in_float32.proof.max_abs_difference < 1e-4


def test_original_base_weights_leave_every_other_tensor_as_it_is(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    run = make_run(llama_folder)
    report = convert(run, tmp_path / "merged", base_weights="original")
    base, merged = tensors_of(llama_folder), tensors_of(tmp_path / "merged")
    adapted = {name for name in base if "q_proj" in name or "v_proj" in name}
    assert len(adapted) == 4
    for name in base.keys() - adapted:
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8)), name
    expected = merged_by_peft(
        llama_folder, run / "checkpoints/latest", nf4=False, double_quant=True, dtype=torch.float32
    )
    assert_equal_to_peft(tmp_path / "merged", expected)
    assert report.tensors == {"adapted": 4, "copied": len(base) - 4}


def test_dequantized_leaves_what_training_does_not_quantize_as_it_is(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    report = convert(make_run(llama_folder), tmp_path / "merged")
    base, merged = tensors_of(llama_folder), tensors_of(tmp_path / "merged")
    assert report.tensors == {"adapted": 4, "dequantized": 10, "copied": len(base) - 14}
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8)), name


@pytest.mark.parametrize("tie", [False, True])
def test_the_folder_is_an_ordinary_one(make_run: MakeRun, tmp_path: Path, tie: bool) -> None:
    base = make_model_folder(tmp_path / "base", tie=tie, shards=2)
    (base / "LICENSE").write_text("free")
    (base / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (base / "training.bin").write_bytes(b"not ours")
    convert(make_run(base), tmp_path / "new" / "merged", max_shard_bytes=60_000)
    merged = tmp_path / "new" / "merged"
    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert ("lm_head.weight" in tensors_of(merged)) == (not tie)
    assert model.generation_config.temperature == 0.25
    tokenizer, original = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.chat_template
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert not {"quantization_config", "torch_dtype"} & config.keys()
    assert (merged / "LICENSE").read_text() == "free"
    assert not (merged / "training.bin").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


def test_sharded_output_holds_the_same_tensors(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder)
    whole = convert(run, tmp_path / "whole")
    sharded = convert(run, tmp_path / "sharded", max_shard_bytes=50_000)
    assert whole.files == ["model.safetensors"]
    assert len(sharded.files) > 3
    assert sharded.files[1] == f"model-00002-of-{len(sharded.files):05d}.safetensors"
    one, many = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "sharded")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sharded.bytes == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"] == {
        name: file for file in sharded.files for name in load_file(tmp_path / "sharded" / file)
    }


def test_the_report_tells_how_much_the_adapter_changed(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder, quantization="none")
    convert(run, tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    base, merged = tensors_of(llama_folder), tensors_of(tmp_path / "merged")
    assert len(report["updates"]) == 4
    for update in report["updates"]:
        before, after = base[update["name"]].float(), merged[update["name"]]
        assert update["weight_norm"] == pytest.approx(float(before.norm()), rel=1e-5)
        assert update["ratio"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert report["proof"]["top1_agreement"] == 1.0
    assert report["step"] == 3


def test_evaluation_rows_of_the_run_are_compared(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "eval.jsonl"
    rows.write_text('{"prompt": "hello", "completion": " world"}\n' * 12)
    run = make_run(llama_folder, eval=str(rows))
    positions = {
        count: convert(run, tmp_path / f"merged-{count}", proof_rows=count).proof.positions for count in (0, 5, None)
    }
    length = (positions[5] - positions[0]) // 5
    assert 2 <= length <= 16
    assert positions[5] == positions[0] + 5 * length
    assert positions[None] == positions[0] + 8 * length
    rows.unlink()
    assert convert(run, tmp_path / "without", proof_rows=None).proof.positions == positions[0]
    with pytest.raises(UserError, match=r"--proof-rows 5: needs .*config\.yaml"):
        convert(run, tmp_path / "refused", proof_rows=5)
    assert not (tmp_path / "refused").exists()


def drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[State], object]:
    keys = ("value", "master", "exp_avg", "exp_avg_sq")
    return lambda state: state.update({name: {key: value.clone() for key in keys}})


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop(f"{V_PROJ}.lora_B.default.weight"), r"v_proj\.lora_B\.weight \[32, 4\] is missing"),
        (put(f"{V_PROJ}.bias.default.weight", torch.ones(2)), r"v_proj\.bias\.weight \[2\] is not a LoRA factor"),
        (
            put("base_model.model.model.layers.7.self_attn.v_proj.lora_A.default.weight", torch.ones(4, 64)),
            r"layers\.7.* \[4, 64\] matches no target module",
        ),
        (put(f"{V_PROJ}.lora_A.default.weight", torch.ones(4, 63)), r"has shape \[4, 63\], the base needs \[4, 64\]"),
        (put(f"{V_PROJ}.lora_A.default.weight", torch.ones(0)), r"lora_A\.weight is empty, \[0\]"),
        (put(f"{V_PROJ}.lora_A.default.weight", torch.full((4, 64), torch.nan)), "not finite"),
        (put(f"{V_PROJ}.lora_A.default.weight", torch.ones(4, 64).half()), r"several dtypes \(.*1 x torch\.float16"),
    ],
    ids=["missing", "unknown factor", "unknown module", "shape", "empty", "nan", "dtypes"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, edit: Callable[[State], object], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        convert(make_run(llama_folder, edit=edit), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_all_faults_of_an_adapter_are_named_at_once(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    def edit(state: State) -> None:
        drop(f"{V_PROJ}.lora_B.default.weight")(state)
        put(f"{V_PROJ}.lora_A.default.weight", torch.ones(4, 0))(state)
        put("base_model.model.more.lora_A.default.weight", torch.ones(4, 4))(state)

    with pytest.raises(UserError) as caught:
        convert(make_run(llama_folder, edit=edit), tmp_path / "merged")
    assert len(caught.value.problems) == 4  # three, and what to do
    text = str(caught.value)
    assert "v_proj.lora_A.weight is empty, [4, 0]: ZeRO-3" in text


def test_the_wrong_base_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base")
    run = make_run(base)
    for path in base.iterdir():
        path.unlink()
    make_model_folder(base, num_layers=3)
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight \[4, 64\] is missing"):
        convert(run, tmp_path / "merged")


def test_dequantized_is_refused_where_nothing_was_quantized(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="trained on the original weights"):
        convert(make_run(llama_folder, quantization="none"), tmp_path / "merged", base_weights="dequantized")


def test_values_that_the_dtype_cannot_hold_are_refused(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder, edit=put(f"{V_PROJ}.lora_A.default.weight", torch.full((4, 64), 1e6)))
    with pytest.raises(UserError, match=r"v_proj\.weight: values up to .* do not fit torch\.float16"):
        convert(run, tmp_path / "merged", dtype="float16")
    assert not list(tmp_path.glob("*merged*"))


def test_an_output_that_is_in_use_is_refused(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        convert(run, tmp_path / "full")
    with pytest.raises(UserError, match="is not a folder"):
        convert(run, tmp_path / "file")
    convert(run, tmp_path / "empty")
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_damaged_checkpoint_is_refused(make_run: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(llama_folder)
    path = checkpoint_folder.resolve(run) / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: the content is not what was written"):
        convert(run, tmp_path / "merged")


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_refused(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_folder.resolve(make_run(llama_folder))

    def without_base(folder: Path) -> None:
        shutil.copytree(
            checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("base.json", "manifest.json")
        )

    checkpoint_folder.write(tmp_path / "checkpoints", 1, without_base)
    with pytest.raises(UserError, match=r"base\.json is missing: the base that was trained on cannot be checked"):
        convert(tmp_path / "checkpoints" / "latest", tmp_path / "merged")


def half_the_update(self: adapter.LowRank, weight: torch.Tensor) -> torch.Tensor:
    return weight + 0.5 * self.scaling * (self.factor_b @ self.factor_a).float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_fails_the_proof_and_leaves_nothing(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    run = make_run(llama_folder)
    convert(run, tmp_path / "right", dtype=dtype)  # type: ignore[arg-type]
    monkeypatch.setattr(adapter.LowRank, "apply", half_the_update)
    with pytest.raises(ProofError):
        convert(run, tmp_path / "merged", dtype=dtype)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*merged*"))


def load_command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_convert", CONVERT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exit_codes(
    make_run: MakeRun,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, run = load_command(), make_run(llama_folder)

    def exit_code(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        code: int = command.main()
        return code

    assert exit_code(run / "checkpoints" / "latest", "--output", tmp_path / "merged") == 0
    assert "top-1 agreement" in capsys.readouterr().out
    assert exit_code(run, "--output", tmp_path / "merged") == 2
    assert capsys.readouterr().err.startswith("error: --output: ")
    assert exit_code(run, "--output", tmp_path / "new", "--max-shard-bytes", 0, "--proof-rows", -1) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert exit_code(tmp_path / "nowhere", "--output", tmp_path / "new") == 2
    assert "no checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(adapter.LowRank, "apply", half_the_update)
    assert exit_code(run, "--output", tmp_path / "wrong") == 1
    assert "was not written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*wrong*"))


@pytest.mark.slow
def test_the_command_runs_as_one_process_without_deepspeed_and_merges_without_transformers(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed.py").write_text("raise AssertionError('deepspeed was imported')")
    script = """
import runpy, sys
from qvtune.convert.sources.source import open_source
from qvtune.convert.conversion import open_conversion
from qvtune.convert.merge.write import write_weights
assert open_conversion and open_source and write_weights
heavy = {"bitsandbytes", "peft", "transformers"} & sys.modules.keys()
assert not heavy, heavy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    # A module of this name that cannot be imported stands in front of the real one.
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = [str(CONVERT), str(make_run(llama_folder)), "--output", str(tmp_path / "merged")]
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
