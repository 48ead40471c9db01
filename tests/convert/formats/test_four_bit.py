"""``--format bnb-4bit``: what quantizing the merged folder would give, without that folder in between."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qvtune.convert.convert import convert
from qvtune.convert.formats import four_bit
from qvtune.convert.merge.tensors import Merger
from qvtune.errors import ProofError, UserError
from qvtune.model import quantize as quantizing
from qvtune.model.quantize import quantize
from qvtune.storage.writer import WrittenFile
from tests.convert.conftest import MakeRun
from tests.support.tiny import make_model_folder

to_4bit = partial(convert, format="bnb-4bit")


@pytest.fixture(autouse=True)
def _limits_of_a_random_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bits move its logits more than any that was trained; what is left of the updates stays as it is."""
    monkeypatch.setattr(four_bit, "QUANTIZED", four_bit.Limits(0.2, None, 3.0))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tie", [False, True])
def test_it_is_the_merged_folder_quantized(make_run: MakeRun, tmp_path: Path, tie: bool) -> None:
    run = make_run(make_model_folder(tmp_path / "base", tie=tie, shards=2), dtype=torch.bfloat16)
    convert(run, tmp_path / "merged", base_weights="original")
    quantize(tmp_path / "merged", tmp_path / "expected")
    report = to_4bit(run, tmp_path / "out", max_shard_bytes=30_000)
    assert (report.base_weights, report.dtype) == ("original", "bfloat16")
    assert report.kept == pytest.approx(1, abs=0.04)
    assert len(report.files) > 1
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected"))
    assert ours == theirs
    manifests = [json.loads((tmp_path / name / "nf4_manifest.json").read_text()) for name in ("out", "expected")]
    assert manifests[0]["source"] == manifests[1]["source"]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


def test_plain_transformers_loads_it_and_computes_with_bitsandbytes_values(
    make_run: MakeRun, llama_fp32_folder: Path, tmp_path: Path
) -> None:
    run = make_run(llama_fp32_folder)
    convert(run, tmp_path / "merged", base_weights="original")
    to_4bit(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).train()  # its inference kernel wants even sizes
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = bnb.dequantize_4bit(codes, state)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.float(), reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_updates_that_quantizing_undoes_are_not_delivered(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    def shrink(state: Any) -> None:
        for entry in state.values():
            entry["value"] *= 0.2

    run = make_run(llama_folder, edit=shrink)
    assert to_4bit(run, tmp_path / "good").kept == pytest.approx(1, abs=0.2)  # few weights, small updates: chance
    with pytest.raises(ProofError, match=r"% of the adapter's updates are left .*--base-weights original"):
        to_4bit(run, tmp_path / "out", base_weights="dequantized")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.0])
def test_a_wrong_merge_is_found_through_the_quantization(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    run = make_run(llama_folder)
    rounded = Merger.rounded
    before: dict[str, torch.Tensor] = tensors_of(llama_folder)

    def wrong(self: Merger, name: str, values: torch.Tensor) -> torch.Tensor:
        base = before[name].float()
        return rounded(self, name, base + factor * (values.view_as(base) - base))

    monkeypatch.setattr(Merger, "rounded", wrong)
    with pytest.raises(ProofError, match="updates are left"):
        to_4bit(run, tmp_path / "out")


def test_a_start_that_was_cut_off_goes_on(
    make_run: MakeRun, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(llama_folder)
    to_4bit(run, tmp_path / "whole", max_shard_bytes=30_000)
    write_shard, written = quantizing._write_shard, []

    def second_is_interrupted(path: Path, **rest: Any) -> WrittenFile:
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write_shard(path, **rest)

    monkeypatch.setattr(quantizing, "_write_shard", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_4bit(run, tmp_path / "out", max_shard_bytes=30_000)
    assert not (tmp_path / "out").exists()
    to_4bit(run, tmp_path / "out", max_shard_bytes=30_000)
    assert written.count(written[0]) == 1
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("merge_report.json", "README.md"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_base_and_a_classifier_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(make_model_folder(tmp_path / "base"))
    with pytest.raises(UserError, match="was trained on another base"):
        to_4bit(run, tmp_path / "out", base=str(make_model_folder(tmp_path / "other", seed=1)))
    assert not (tmp_path / "out").exists()
