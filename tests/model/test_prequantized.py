"""Bases that are stored in bitsandbytes' 4-bit format, as transformers and other tools write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model.loader import fill, load_whole, open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Shard, Whole
from tests.model.one_of_many import Alone

CPU = torch.device("cpu")


def store(source: Path, folder: Path, **options: Any) -> Path:
    """``source`` as transformers quantizes and saves it."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_codes_and_statistics_are_taken_as_they_are(
    tmp_path: Path, llama_folder: Path, double_quant: bool, storage: torch.dtype
) -> None:
    options = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": storage}
    section = ModelSection(double_quant=double_quant)
    stored = load_whole(store(llama_folder, tmp_path / "stored", **options), section, torch.float32)
    quantized = dict(load_whole(llama_folder, section, torch.float32).named_modules())
    matrices = {name: module for name, module in stored.named_modules() if isinstance(module, NF4Linear)}
    assert len(matrices) >= 14
    for name, module in matrices.items():
        for piece in module.layout.piece_bytes():
            ours, expected = (getattr(source, piece).data.view(torch.uint8) for source in (module, quantized[name]))
            assert torch.equal(ours, expected), (name, piece)
        assert torch.equal(module.offset, quantized[name].offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_reads_its_bytes_only(tmp_path: Path, llama_folder: Path, num_ranks: int) -> None:
    folder = store(llama_folder, tmp_path / "stored")
    whole = open_base(folder, ModelSection(), torch.float32, "sdpa")
    fill(whole, Whole(CPU), torch.float32)
    for rank in range(num_ranks):
        base = open_base(folder, ModelSection(), torch.float32, "sdpa")
        report, _ = fill(base, Alone(Shard(rank, num_ranks)), torch.float32)
        described = sum(tensor.num_bytes for name, tensor in base.weights.items() if ".weight." in name)
        assert report.bytes_read <= whole.weights.bytes_read / num_ranks + 2 * described
        for name, parameter in base.skeleton.named_parameters():
            complete = whole.skeleton.get_parameter(name).data.flatten()
            start, end = Shard(rank, num_ranks).span(complete.numel())
            assert torch.equal(parameter.data[: end - start].view(torch.uint8), complete[start:end].view(torch.uint8))


def test_settings_that_do_not_fit_are_refused(tmp_path: Path, llama_folder: Path) -> None:
    folder = store(llama_folder, tmp_path / "stored")
    with pytest.raises(UserError, match=r"stored in 4 bits; set model\.quantization: nf4"):
        load_whole(folder, ModelSection(quantization="none"), torch.float32)
    with pytest.raises(UserError, match=r"set model\.double_quant: True"):
        load_whole(folder, ModelSection(double_quant=False), torch.float32)
    with pytest.raises(UserError, match=r"q_proj and 3 other matrices that adapter\.method: full trains are stored"):
        load_whole(folder, ModelSection(), torch.float32, adapter=AdapterSection(method="full"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "stored as fp4; only nf4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "one in bitsandbytes' 4-bit"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, llama_folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_whole(store(llama_folder, tmp_path / "stored", **options), ModelSection(), torch.float32)


def test_a_missing_piece_and_another_table_are_named(tmp_path: Path, llama_folder: Path) -> None:
    folder = store(llama_folder, tmp_path / "stored")
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != f"{name}.absmax"}, path)
    with pytest.raises(UserError, match=f"'{name}.absmax' is missing"):
        load_whole(folder, ModelSection(), torch.float32)
    save_file(tensors | {f"{name}.quant_map": tensors[f"{name}.quant_map"] * 2}, path)
    with pytest.raises(UserError, match=f"'{name}.quant_map' is not bitsandbytes' table"):
        load_whole(folder, ModelSection(), torch.float32)
