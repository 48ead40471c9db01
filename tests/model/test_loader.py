"""The loaded base against transformers' own loading, plain and in 4 bits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.loader import fill, load_whole, open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Whole
from tests.support.tiny import DECODERS, VOCABULARY, four_bit_config, make_model_folder

CPU = torch.device("cpu")
INPUT_IDS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def transformers_model(folder: Path, section: ModelSection) -> nn.Module:
    """The same folder through from_pretrained; in 4 bits as QLoRA does."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if section.quantization == "nf4":
        options["quantization_config"] = four_bit_config(section.double_quant)
    # In eval mode bitsandbytes multiplies with other CPU kernels, which compute less exactly.
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options).train()
    return model


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs(input_ids=INPUT_IDS).logits
    assert expected.std() > 0.1, "the logits say something"
    torch.testing.assert_close(ours.train()(input_ids=INPUT_IDS).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_nf4_logits_equal_transformers(family: str, tie: bool, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / family, family, tie=tie)
    section = ModelSection(quantization="nf4", double_quant=True)
    assert_same_logits(load_whole(folder, section, torch.float32), transformers_model(folder, section))


@pytest.mark.parametrize("family", DECODERS)
def test_plain_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / family, family, dtype=torch.float32)
    section = ModelSection(quantization="none")
    assert_same_logits(load_whole(folder, section, torch.float32), transformers_model(folder, section))


def test_without_double_quantization_too(llama_folder: Path) -> None:
    section = ModelSection(double_quant=False)
    assert_same_logits(load_whole(llama_folder, section, torch.float32), transformers_model(llama_folder, section))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_sharded_folder_gives_the_same_model(tmp_path: Path, llama_folder: Path, quantization: Any) -> None:
    section = ModelSection(quantization=quantization)
    sharded = load_whole(make_model_folder(tmp_path / "sharded", shards=4), section, torch.float32)
    whole = load_whole(llama_folder, section, torch.float32)
    parameters = dict(whole.named_parameters())
    assert len(parameters) > 20
    for name, parameter in sharded.named_parameters():  # as bytes: quantized ones read as floats may be NaN
        assert torch.equal(parameter.data.view(torch.uint8), parameters[name].data.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_the_compute_dtype(llama_fp32_folder: Path, dtype: torch.dtype) -> None:
    """Quantization starts from the stored fp32 weights, not from their bf16 roundings."""
    ours: Any = load_whole(llama_fp32_folder, ModelSection(), dtype)
    theirs: Any = transformers_model(llama_fp32_folder, ModelSection())
    for layer, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        codes, _ = layer.self_attn.q_proj.quant_state()
        assert torch.equal(codes.view(-1), other.self_attn.q_proj.weight.data.view(torch.uint8).view(-1))


def test_only_the_output_head_and_what_is_no_matrix_stay_unquantized(llama_folder: Path) -> None:
    model: Any = load_whole(llama_folder, ModelSection(), torch.float32)
    quantized = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert quantized == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.lm_head) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_tied_head_is_one_parameter_read_once(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tied", tie=True)
    model: Any = load_whole(folder, ModelSection(), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tie", [False, True])
def test_bytes_read_and_bytes_kept(tmp_path: Path, tie: bool) -> None:
    folder = make_model_folder(tmp_path / "model", tie=tie)
    stored = load_file(folder / "model.safetensors")
    base = open_base(folder, ModelSection(), torch.float32, "sdpa")
    report, _ = fill(base, Whole(CPU), torch.float32)
    assert report.bytes_read == sum(tensor.nbytes for tensor in stored.values()), "every byte once"

    def kept(name: str, tensor: torch.Tensor) -> int:
        if "_proj" not in name:
            return tensor.numel() * 4
        blocks = math.ceil(tensor.numel() / 64)  # codes, 8-bit absmax, fp32 nested absmax; each in whole fp32 elements
        return 4 * (math.ceil(tensor.numel() / 8) + math.ceil(blocks / 4) + math.ceil(blocks / 256))

    assert report.base_bytes == sum(kept(name, tensor) for name, tensor in stored.items())
    assert report.seconds > 0 and report.peak_rss_bytes > report.base_bytes


def rewrite(folder: Path, *, drop: str | None = None, **changed: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, folder / "model.safetensors")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_difference_to_the_architecture_is_listed(tmp_path: Path, quantization: Any) -> None:
    folder = make_model_folder(tmp_path / "model")
    odd = {
        "model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64),
        "model.norm.weight": torch.zeros(65),
        "model.layers.7.extra": torch.zeros(3),
        "another": torch.zeros(2, 2),
    }
    rewrite(folder, drop="model.layers.1.mlp.up_proj.weight", **odd)
    with pytest.raises(UserError) as caught:
        load_whole(folder, ModelSection(quantization=quantization), torch.float32)
    text = str(caught.value)
    assert "'model.layers.1.mlp.up_proj.weight' [100, 64] is missing" in text
    assert "'model.layers.0.self_attn.k_proj.weight' has shape [16, 64], expected [32, 64]" in text
    assert "'model.norm.weight' has shape [65], expected [64]" in text
    assert text.index("'another' [2, 2] has no place") < text.index("'model.layers.7.extra' [3] has no place"), "sorted"
    assert caught.value.problems[-1] == "config.json and the weights do not belong together"
    assert len(caught.value.problems) == 6


def test_biases_belong_to_the_architecture(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "qwen2", "qwen2")
    rewrite(folder, drop="model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(UserError, match=r"q_proj\.bias' \[64\] is missing"):
        load_whole(folder, ModelSection(), torch.float32)


def test_a_tied_head_may_be_stored_as_well(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tied", tie=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, **{"lm_head.weight": embedding.clone()})
    open_base(folder, ModelSection(), torch.float32, "sdpa")
