"""Models that run layer by layer, against whole ones of transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, FalconConfig, FalconForCausalLM

from qvtune.config.schema import ModelSection
from qvtune.convert.conversion import open_conversion
from qvtune.convert.merge.base import open_merge_base
from qvtune.convert.merge.changes import LowRank
from qvtune.convert.proof import layers
from qvtune.convert.proof.layers import LayeredModel, empty_model, skeleton
from qvtune.convert.proof.views import ModelView, adapted_base, merged_folder, unmerged
from qvtune.convert.sources.source import open_source
from qvtune.errors import UserError
from tests.convert.conftest import MakeRun
from tests.support.tiny import DECODERS, VOCABULARY, make_model_folder

TEXTS = [
    list(range(3, 103)),
    [7, 8, 9],
    list(range(90)),
    list(range(200, 299)),
]  # the second is in no batch with others
# Layers that return tuples and lists; a head that is stored under another name than the model's.
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "opt": {"ffn_dim": 100, "word_embed_proj_dim": 64},
}


def streamed(
    model: LayeredModel, views: list[ModelView], texts: list[list[int]] = TEXTS, max_entries: int = VOCABULARY
) -> list[list[torch.Tensor]]:
    """[view][text]: logits [T, V], put together from parts of at most ``max_entries`` of the vocabulary."""
    parts: list[list[list[torch.Tensor]]] = [[[] for _ in texts] for _ in views]
    for text, first, logits in model.logits(views, texts):
        for view, part in enumerate(logits):
            assert sum(one.shape[1] for one in parts[view][text]) == first
            assert part.shape[1] <= max_entries
            parts[view][text].append(part)
    return [[torch.cat(text, dim=1) for text in view] for view in parts]


def whole(model: nn.Module, texts: list[list[int]] = TEXTS) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in texts]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", [*DECODERS, "gpt2", "gemma2", "phi3", *OTHERS])
def test_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tie: bool
) -> None:
    monkeypatch.setattr(layers, "_HEAD_WEIGHTS", 64 * 100)  # the vocabulary in four parts
    options = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256} if family == "gpt2" else {}
    options |= OTHERS.get(family, {})
    folder = make_model_folder(tmp_path / "model", family, tie=tie, dtype=torch.float32, **options)
    model = empty_model(folder, {}, trust_remote_code=False)
    view = merged_folder(folder)
    model.require_names(view.names, "the folder")
    expected = whole(AutoModelForCausalLM.from_pretrained(folder))
    for found, logits in zip(streamed(model, [view], max_entries=100)[0], expected, strict=True):
        assert found.shape[1] == VOCABULARY
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_adapted_side_is_pefts_model(make_run: MakeRun, llama_folder: Path, quantization: str) -> None:
    run = make_run(llama_folder, quantization=quantization)
    source = open_source(run)
    conversion = open_conversion(source, None, "auto")
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    for name, parameter in base.named_parameters():  # the values of training; that they are right is tested elsewhere
        parameter.data = conversion.base.reader(name)(0, parameter.numel()).float().view(parameter.shape)
    before = whole(base)
    expected = whole(PeftModel.from_pretrained(base, source.path))
    view = adapted_base(conversion.base, conversion.adapter)
    found = streamed(empty_model(llama_folder, {}, trust_remote_code=False), [ModelView(view.names, view.read), view])
    for one, other in zip([*found[0], *found[1]], [*before, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0], found[1][0], atol=0.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_magnitude", [False, True])
def test_the_unmerged_formula_is_that_of_the_definition(transposed: bool, with_magnitude: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(12, 10, generator=generator), torch.randn(12, generator=generator)
    factor_a, factor_b = torch.randn(3, 10, generator=generator), torch.randn(12, 3, generator=generator)
    magnitude = torch.rand(12, generator=generator) + 0.5 if with_magnitude else None
    x = torch.randn(5, 10, generator=generator)
    merged = weight.double() + 1.5 * factor_b.double() @ factor_a.double()
    if magnitude is not None:
        merged *= (magnitude / merged.norm(dim=1))[:, None]
    linear = nn.Linear(10, 12)
    linear.weight.data, linear.bias.data = weight, bias
    if transposed:  # as transformers' Conv1D
        linear.weight.data = weight.T.contiguous()
        linear.forward = lambda x: x @ linear.weight + linear.bias  # type: ignore[method-assign]
    linear.register_forward_hook(unmerged(LowRank(factor_a, factor_b, 1.5, transposed, magnitude)))
    torch.testing.assert_close(linear(x).double(), x.double() @ merged.T + bias, rtol=1e-5, atol=1e-5)


def test_a_classification_head_gives_one_position_a_text(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "base", "llama", dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    model = empty_model(tmp_path / "classifier", {}, trust_remote_code=False)
    found = streamed(model, [merged_folder(tmp_path / "classifier")])[0]
    assert [logits.shape for logits in found] == [(1, 3)] * len(TEXTS)
    for one, logits in zip(found, whole(classifier), strict=True):
        torch.testing.assert_close(one[0], logits, rtol=1e-5, atol=1e-5)


def test_falcon_returns_tuples_too(tmp_path: Path) -> None:
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    found = streamed(empty_model(tmp_path, {}, trust_remote_code=False), [merged_folder(tmp_path)])[0]
    for one, logits in zip(found, whole(AutoModelForCausalLM.from_pretrained(tmp_path)), strict=True):
        torch.testing.assert_close(one, logits, rtol=1e-5, atol=1e-5)


def test_a_view_may_run_on_some_texts_only(llama_folder: Path) -> None:
    model, view = empty_model(llama_folder, {}, trust_remote_code=False), merged_folder(llama_folder)
    everywhere = streamed(model, [view])[0]
    seen: dict[int, list[torch.Tensor]] = {}
    for text, _, logits in model.logits([view, view], TEXTS, {1: [1, 3]}):
        assert len(logits) == (2 if text in (1, 3) else 1)
        seen[text] = logits
    assert sorted(seen) == [0, 1, 2, 3]
    for text, logits in seen.items():
        for one in logits:
            torch.testing.assert_close(one, everywhere[text], rtol=1e-4, atol=1e-4)


def test_architectures_that_cannot_be_streamed_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "bigbird_pegasus")
    with pytest.raises(UserError, match=r"BigBirdPegasusForCausalLM has 0 lists .*: a proof cannot go through models"):
        empty_model(folder, {}, trust_remote_code=False)
    llama = make_model_folder(tmp_path / "llama")
    architecture = skeleton(llama, {}, trust_remote_code=False)
    model = LayeredModel(architecture)
    architecture.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(UserError, match=r"LlamaDecoderLayer is not all that happens between hidden states: a proof"):
        streamed(model, [merged_folder(llama)])
    architecture = skeleton(llama, {}, trust_remote_code=False)
    model = LayeredModel(architecture)
    architecture.model.layers.append(architecture.model.layers[0])
    architecture.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="LlamaForCausalLM calls its layers otherwise than once each: a proof"):
        streamed(model, [merged_folder(llama)])
    names = open_merge_base(folder, ModelSection(quantization="none"), torch.float32).tensors
    with pytest.raises(UserError, match=r"pegasus: tensor 'model.embed_tokens.weight' of the architecture is missing"):
        empty_model(llama, {}, trust_remote_code=False).require_names(names, "pegasus")
