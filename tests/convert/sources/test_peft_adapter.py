"""Adapters from elsewhere: what PEFT saves, in all its variants, becomes what PEFT merges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from qvtune.errors import UserError
from tests.convert.foreign import assert_same, merged_by_peft, merged_by_us, save_adapter
from tests.support.tiny import make_hub_cache, make_model_folder

LM = AutoModelForCausalLM
QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 7},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
    "regex": {"target_modules": r".*\.layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "every norm": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "tokens": {"trainable_token_indices": [3, 17, 330]},
    "output head": {"target_modules": ["v_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv1D, learned positions, tied embeddings, square and oblong matrices."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=67, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_what_peft_merges(llama_fp32_folder: Path, tmp_path: Path, variant: str) -> None:
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **QV | VARIANTS[variant])
    expected = merged_by_peft(llama_fp32_folder, adapter, LM).state_dict()
    found, ours = merged_by_us(adapter)
    assert_same(found, expected)
    assert ours.changes and not ours.config
    base = load_file(llama_fp32_folder / "model.safetensors")
    for name in found.keys() - ours.changes.keys():
        assert torch.equal(found[name], base[name]), name
    assert not all(torch.equal(found[name], base[name]) for name in base)


def test_a_16_bit_base_is_off_by_one_unit_in_the_last_place_at_most(llama_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_folder, tmp_path / "adapter", LM, **QV)
    expected = merged_by_peft(llama_folder, adapter, LM).state_dict()
    assert expected["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert_same(merged_by_us(adapter)[0], expected, tolerance=2**-7)  # PEFT rounds the update before adding it


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(tmp_path: Path, bias: str) -> None:
    base = make_model_folder(tmp_path / "base", "qwen2", dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", LM, **QV | {"bias": bias})
    found, ours = merged_by_us(adapter)
    assert_same(found, merged_by_peft(base, adapter, LM).state_dict())
    assert sum(name.endswith("bias") for name in ours.changes) == (6 if bias == "all" else 4)


@pytest.mark.parametrize("dora", [False, True])
def test_fan_in_fan_out(gpt2: Path, tmp_path: Path, dora: bool) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    adapter = save_adapter(
        gpt2, tmp_path / "adapter", LM, target_modules=targets, r=3, fan_in_fan_out=True, use_dora=dora
    )
    expected = merged_by_peft(gpt2, adapter, LM).state_dict()
    del expected["lm_head.weight"]
    assert_same(merged_by_us(adapter)[0], expected)


def test_a_file_without_the_prefix_of_the_inner_model(gpt2: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    GPT2LMHeadModel.from_pretrained(gpt2).transformer.save_pretrained(plain)
    assert "h.0.attn.c_attn.weight" in load_file(plain / "model.safetensors")
    adapter = save_adapter(plain, tmp_path / "adapter", LM, target_modules=["c_attn"], fan_in_fan_out=True)
    expected = merged_by_peft(plain, adapter, LM).transformer.state_dict()
    assert_same(merged_by_us(adapter)[0], expected)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_a_classification_head_takes_the_place_of_the_bases(tmp_path: Path, family: str) -> None:
    base = make_model_folder(tmp_path / "base", family, dtype=torch.float32)
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    architecture, options = AutoModelForSequenceClassification, {"num_labels": 5}
    adapter = save_adapter(
        base, tmp_path / "adapter", architecture, options=options, r=4, target_modules=targets, task_type="SEQ_CLS"
    )
    expected = merged_by_peft(base, adapter, architecture, **options)
    found, ours = merged_by_us(adapter)
    if family == "bert":  # its pooler is in no file: the masked model that was saved has none
        for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias"):
            found[name] = expected.state_dict()[name]
    assert_same(found, expected.state_dict())
    assert ours.config["architectures"] == [type(expected).__name__]
    assert len(ours.config["id2label"]) == 5


def test_a_token_classifier(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", "bert", dtype=torch.float32)
    architecture = AutoModelForTokenClassification
    adapter = save_adapter(base, tmp_path / "adapter", architecture, target_modules=["key"], task_type="TOKEN_CLS")
    found, ours = merged_by_us(adapter)
    assert_same(found, merged_by_peft(base, adapter, architecture).state_dict())
    assert ours.config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


TIED = {
    "output only": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "input only": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "low rank on the input": {"target_modules": ["v_proj", "embed_tokens"]},
    "low rank on the output": {"target_modules": ["v_proj", "lm_head"]},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_are_untied_where_training_changed_one(tmp_path: Path, case: str) -> None:
    base = make_model_folder(tmp_path / "base", tie=True, dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", LM, **QV | TIED[case])
    found, ours = merged_by_us(adapter)
    assert ours.config == {"tie_word_embeddings": False}
    # Not against merge_and_unload, which changes both where they share memory: against the logits that were trained.
    untied = LM.from_config(AutoConfig.from_pretrained(base, tie_word_embeddings=False)).eval()
    untied.load_state_dict(found)
    trained = PeftModel.from_pretrained(LM.from_pretrained(base), adapter).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(untied(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied_where_training_kept_them_so(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", tie=True, dtype=torch.float32)
    kept = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for number, settings in enumerate([{"trainable_token_indices": [2, 9]}, kept]):
        adapter = save_adapter(base, tmp_path / str(number), LM, **QV | settings)
        found, ours = merged_by_us(adapter)
        expected = merged_by_peft(base, adapter, LM).state_dict()
        torch.testing.assert_close(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
        assert_same(found, expected)
        assert not ours.config and not ours.added


def test_a_head_that_was_to_be_saved_and_is_not_there(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", tie=True, dtype=torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", LM, **QV | {"modules_to_save": ["lm_head"]})
    tensors(lambda stored: stored.pop("base_model.model.lm_head.weight"))(adapter)
    with pytest.raises(UserError, match=r"lm_head\.weight is missing \(modules_to_save\)"):
        merged_by_us(adapter)


def test_older_layouts_mean_the_same(llama_fp32_folder: Path, tmp_path: Path) -> None:
    settings = QV | {"use_dora": True, "modules_to_save": ["lm_head"]}
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **settings)
    expected, _ = merged_by_us(adapter)
    file = adapter / "adapter_model.safetensors"
    old = {
        key.replace("lm_head.", "lm_head.modules_to_save.")
        .replace("lora_A.", "lora_A.default.")
        .replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight"): tensor
        for key, tensor in load_file(file).items()
    }
    old["base_model.model.lm_head.original_module.weight"] = torch.zeros(1)
    file.unlink()
    torch.save(old, adapter / "adapter_model.bin")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("use_rslora", "rank_pattern", "exclude_modules", "ensure_weight_tying"):
        del config[key]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_model\.bin: is a pickle.*--allow-pickle"):
        merged_by_us(adapter)
    found, _ = merged_by_us(adapter, allow_pickle=True)
    assert_same(found, expected, tolerance=0)


def code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (path.with_name("ran"),))

    torch.save({"x": Evil()}, path)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_does_not_run(llama_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_folder, tmp_path / "adapter", LM, **QV)
    (adapter / "adapter_model.safetensors").unlink()
    code(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        merged_by_us(adapter, allow_pickle=True)
    assert not (adapter / "ran").exists()


def configure(**settings: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return edit


def tensors(edit_tensors: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        stored = load_file(folder / "adapter_model.safetensors")
        edit_tensors(stored)
        save_file(stored, folder / "adapter_model.safetensors")

    return edit


V = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (configure(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
        (configure(layer_replication=[[0, 1]]), "layer_replication is .*repeats layers"),
        (configure(alora_invocation_tokens=[1]), "tokens after an invocation"),
        (configure(use_qalora=True), "use_qalora is True"),
        (configure(use_bdlora={"nblocks": 2}), "block-diagonal"),
        (configure(of_next_year=True), "of_next_year is True: unknown; cannot be merged"),
        (configure(init_lora_weights="pissa"), "changed the base before training"),
        (configure(bias="some"), "bias is 'some'; allowed: none, all, lora_only"),
        (configure(base_model_name_or_path=None), "names no base .*--base"),
        (configure(base_model_name_or_path="/nowhere/at/all"), "where it is now is said with --base"),
        (configure(r=8), r"lora_A\.weight has shape \[4, 64\], the base needs \[8, 64\]"),
        (configure(use_dora=True), r"v_proj\.lora_magnitude_vector \[32\] is missing"),
        (configure(modules_to_save=["lm_head"]), r"lm_head\.weight is missing \(modules_to_save\)"),
        (configure(target_modules=["q_proj"]), r"v_proj\.lora_A\.weight \[4, 64\] is not among target_modules"),
        (configure(task_type="SEQ_CLS"), "no head was saved"),
        (tensors(lambda stored: stored.pop(f"{V}.lora_B.weight")), r"v_proj\.lora_B\.weight \[32, 4\] is missing"),
        (tensors(lambda stored: stored.clear()), "holds no tensors"),
        (
            tensors(lambda stored: stored.update({f"{V}.lora_A.weight": torch.ones(0)})),
            r"lora_A\.weight is empty, \[0\]: ZeRO-3 saved it without gathering",
        ),
        (tensors(lambda stored: stored[f"{V}.lora_A.weight"].fill_(torch.nan)), "values that are not finite"),
        (
            tensors(lambda stored: stored.update({"base_model.model.model.norm.weight": torch.ones(64)})),
            r"norm\.weight \[64\] is not a LoRA factor, nor of a module in modules_to_save",
        ),
        (
            tensors(lambda stored: stored.update({"base_model.model.lm_head.weight": torch.ones(400, 64)})),
            r"has shape \[400, 64\], the base needs \[331, 64\]; was the vocabulary resized",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{}"), "cannot be read as safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has adapter_config.json but neither"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(
    llama_fp32_folder: Path, tmp_path: Path, edit: Callable[[Path], object], problem: str
) -> None:
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **QV)
    edit(adapter)
    with pytest.raises(UserError, match=problem):
        merged_by_us(adapter)


K, DOWN = (f"base_model.model.model.layers.1.{module}.ia3_l" for module in ("self_attn.k_proj", "mlp.down_proj"))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (tensors(lambda stored: stored.pop(K)), r"k_proj\.ia3_l is missing"),
        (
            tensors(lambda stored: stored.update({K: torch.ones(7, 1)})),
            r"\[7, 1\], the base needs \[32, 1\] or \[1, 64\]",
        ),
        (configure(target_modules=["k_proj"]), r"down_proj\.ia3_l \[1, 100\] matches no target module"),
        (configure(fan_in_fan_out=True), "fan_in_fan_out with IA3"),
        (configure(peft_type="LORA", r=4, lora_alpha=4), r"k_proj\.ia3_l \[32, 1\] matches no target module"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_with_the_reason(
    llama_fp32_folder: Path, tmp_path: Path, edit: Callable[[Path], object], problem: str
) -> None:
    """(IA)^3, as PEFT saves it; unchanged, it is what PEFT merges."""
    model = get_peft_model(
        LM.from_pretrained(llama_fp32_folder),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    expected = merged_by_peft(llama_fp32_folder, tmp_path / "adapter", LM).state_dict()
    assert_same(merged_by_us(tmp_path / "adapter")[0], expected)
    edit(tmp_path / "adapter")
    with pytest.raises(UserError, match=problem):
        merged_by_us(tmp_path / "adapter")


def test_an_adapter_for_another_base_is_refused_by_every_misfit(llama_fp32_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **QV)
    more = make_model_folder(tmp_path / "more", num_layers=3)
    with pytest.raises(UserError) as caught:
        merged_by_us(adapter, base=more)
    assert [problem.count("layers.2.") for problem in caught.value.problems] == [1, 1, 0]
    wider = make_model_folder(tmp_path / "wider", head_dim=24)
    with pytest.raises(UserError) as caught:
        merged_by_us(adapter, base=wider)
    assert len(caught.value.problems) == 5
    assert r"q_proj.lora_B.weight has shape [64, 4], the base needs [96, 4]" in str(caught.value)


def test_the_revision_that_an_adapter_names_is_the_base(
    llama_fp32_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = make_model_folder(tmp_path / "other", dtype=torch.float32, seed=1)
    make_hub_cache(tmp_path / "hub", "owner/tiny", {"main": other, "v2": llama_fp32_folder})
    adapter = save_adapter(llama_fp32_folder, tmp_path / "adapter", LM, **QV)
    expected = merged_by_us(adapter)[0]
    configure(base_model_name_or_path="owner/tiny", revision="v2")(adapter)
    assert_same(merged_by_us(adapter)[0], expected)
    configure(revision="v3")(adapter)
    with pytest.raises(UserError, match=r"`hf download owner/tiny --revision v3`"):
        merged_by_us(adapter)
    assert_same(merged_by_us(adapter, base=llama_fp32_folder)[0], expected)
