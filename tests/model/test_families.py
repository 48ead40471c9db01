"""Each family's own: encoders and their checkpoints, rotary scaling, scaled embeddings; and who is refused, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import load_whole, open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.quantize import quantize
from qvtune.model.skeleton import read_model_config
from tests.support.tiny import ENCODERS, VOCABULARY, four_bit_config, make_model_folder

INPUT_IDS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
# Of a row's end: what an encoder must not see.
PADDED = torch.ones(2, 24, dtype=torch.long).index_fill(1, torch.arange(20, 24), 0)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def in_4_bits(architecture: Any, folder: Path, **options: Any) -> Any:
    """transformers' own model; in train mode, since bitsandbytes' kernels for eval mode compute less exactly."""
    options |= {"dtype": torch.float32, "quantization_config": four_bit_config()}
    return architecture.from_pretrained(folder, **options).train()


def hidden_states(model: nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=INPUT_IDS, attention_mask=PADDED).last_hidden_state
    assert output.std() > 0.1
    return output


def encoder_folder(path: Path, family: str, **options: Any) -> Path:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return make_model_folder(path, family, **no_dropout, **options)


def rewrite(folder: Path, names: dict[str, str], **more: torch.Tensor) -> None:
    """Rename parts of the names of a folder's tensors; add some."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        assert any(old in name for name in tensors)
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_equals_transformers(tmp_path: Path, family: str) -> None:
    folder = encoder_folder(tmp_path / family, family)
    assert all(name.startswith((f"{family}.", "cls.", "lm_head.")) for name in load_file(folder / "model.safetensors"))
    ours = load_whole(folder, ModelSection(), torch.float32).train()
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) == 12, "six matrices a layer, no head"
    expected = hidden_states(in_4_bits(AutoModel, folder, add_pooling_layer=False))
    torch.testing.assert_close(hidden_states(ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_gradients_equal_peft(tmp_path: Path, family: str) -> None:
    folder = encoder_folder(tmp_path / family, family)
    torch.manual_seed(1)
    ours = add_adapters(load_whole(folder, ModelSection(), torch.float32), AdapterSection(rank=4), str(folder), seed=0)
    for name, parameter in trainable(ours):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, lora_alpha=32, target_modules=["query", "value"])
    theirs = get_peft_model(in_4_bits(AutoModel, folder, add_pooling_layer=False), config).train()
    assert not theirs.load_state_dict(dict(trainable(ours)), strict=False).unexpected_keys
    weights = torch.randn(2, 24, 64)
    losses = [(hidden_states(model) * weights).sum() for model in (ours.train(), theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in trainable(theirs)}
    assert len(expected) == 8
    for name, parameter in trainable(ours):
        largest = expected[name].abs().max().item()  # of single entries, some are sums that cancel
        assert largest > 0
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_without_prefix_and_with_a_pooler(tmp_path: Path, family: str) -> None:
    prefixed, bare = encoder_folder(tmp_path / "prefixed", family), tmp_path / "bare"
    AutoModel.from_pretrained(prefixed).save_pretrained(bare)
    names = set(load_file(bare / "model.safetensors"))
    assert "pooler.dense.weight" in names and "encoder.layer.0.attention.self.query.weight" in names
    ours: Any = load_whole(bare, ModelSection(), torch.float32).train()
    theirs = in_4_bits(AutoModel, bare)
    torch.testing.assert_close(hidden_states(ours), hidden_states(theirs), rtol=1e-5, atol=1e-5)
    pooled, expected = (model(input_ids=INPUT_IDS).pooler_output for model in (ours, theirs))
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    same: Any = load_whole(prefixed, ModelSection(), torch.float32)
    assert same.pooler is None, "this checkpoint has none, so none is made up"
    torch.testing.assert_close(hidden_states(same.train()), hidden_states(ours), rtol=0, atol=0)


def test_the_oldest_names_of_layer_norms(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "old", "bert")
    expected = hidden_states(load_whole(folder, ModelSection(), torch.float32))
    rewrite(folder, {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"})
    ours = load_whole(folder, ModelSection(), torch.float32)
    torch.testing.assert_close(hidden_states(ours), expected, rtol=0, atol=0)


def test_what_is_missing_or_extra_in_an_encoder_is_still_seen(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "bert", "bert")
    rewrite(folder, {"bert.encoder.layer.1.output.dense.bias": "bert.encoder.layer.1.other"})
    with pytest.raises(UserError) as caught:
        open_base(folder, ModelSection(), torch.float32, "sdpa")
    text = str(caught.value)
    assert "'encoder.layer.1.output.dense.bias' [64] is missing" in text
    assert "'encoder.layer.1.other' [64] has no place" in text
    assert len(caught.value.problems) == 3, "heads are left alone"


def test_a_decoder_has_no_heads_to_spare(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "llama")
    rewrite(folder, {}, **{"cls.predictions.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"'cls\.predictions\.bias' \[3\] has no place"):
        open_base(folder, ModelSection(), torch.float32, "sdpa")


@pytest.mark.parametrize("family", [*ENCODERS, "gemma3_text"])
def test_quantized_once_it_is_the_same_model(tmp_path: Path, family: str) -> None:
    source = make_model_folder(tmp_path / "source", family)
    quantize(source, tmp_path / "stored")
    expected = dict(load_whole(source, ModelSection(), torch.float32).named_parameters())
    stored = dict(load_whole(tmp_path / "stored", ModelSection(), torch.float32).named_parameters())
    assert stored.keys() == expected.keys() and len(stored) > 20
    for name, parameter in stored.items():  # as bytes: quantized ones read as floats may be NaN
        assert torch.equal(parameter.data.view(torch.uint8), expected[name].data.view(torch.uint8)), name


def test_an_encoder_from_a_pickle(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "bert", "bert")
    expected = hidden_states(load_whole(folder, ModelSection(), torch.float32))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ours = load_whole(folder, ModelSection(allow_pickle=True), torch.float32)
    torch.testing.assert_close(hidden_states(ours), expected, rtol=0, atol=0)


@torch.no_grad()
def test_rotary_scaling_of_llama_3(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "llama3", rope_parameters=LLAMA3_ROPE)
    ours: Any = load_whole(folder, ModelSection(), torch.float32).train()
    unscaled: Any = load_whole(make_model_folder(tmp_path / "llama"), ModelSection(), torch.float32).train()
    logits = ours(input_ids=INPUT_IDS).logits
    expected = in_4_bits(AutoModelForCausalLM, folder)(input_ids=INPUT_IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - unscaled(input_ids=INPUT_IDS).logits).abs().max() > 1e-3, "the scaling decides something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_buffers_that_no_checkpoint_holds(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Rotary frequencies, the scale of Gemma's embeddings: the bits and dtypes that transformers gives them."""
    folder = make_model_folder(tmp_path / family, family)
    ours = load_whole(folder, ModelSection(quantization="none"), dtype)
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_buffers())
    assert expected and ("model.embed_tokens.embed_scale" in expected) is (family == "gemma3_text")
    buffers = dict(ours.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name


def config_folder(path: Path, **values: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("phi3", r"qkv_proj.*q_proj, k_proj and v_proj"),
        ("mixtral", r"experts.*give a dense model"),
        ("qwen2_moe", r"experts.*give a dense model"),
        ("qwen3_moe", r"experts.*give a dense model"),
        ("gemma2", r"caps its attention scores.*gemma3_text"),
        ("gemma3", r"image.*give a text-only checkpoint"),
        ("gpt2", r"supported: llama, mistral, qwen2, qwen3, gemma3_text, bert, roberta"),
    ],
)
def test_refused_families_say_what_to_do(tmp_path: Path, family: str, reason: str) -> None:
    folder = config_folder(tmp_path / family, model_type=family)
    with pytest.raises(UserError, match=rf"config\.json: model_type is '{family}'.*{reason}"):
        read_model_config(folder, ModelSection())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"logit_scale": 0.0625}),
        ("llama", {"logits_scaling": 8.0, "lm_head_multiplier": 0.5}),
    ],
)
def test_what_the_loss_does_not_compute_is_refused(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read_model_config(config_folder(tmp_path / family, model_type=family, **settings), ModelSection())
    assert len(caught.value.problems) == len(settings)
    for name, value in settings.items():
        assert f"config.json: {name} = {value!r} " in str(caught.value)


def test_a_factor_of_one_is_no_scaling(tmp_path: Path) -> None:
    settings = {"logit_scale": 1.0, "logits_scaling": 1, "final_logit_softcapping": None}
    read_model_config(config_folder(tmp_path / "llama", model_type="llama", **settings), ModelSection())
