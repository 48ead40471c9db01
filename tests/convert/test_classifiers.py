"""A checkpoint of a classifier becomes an ordinary folder for AutoModelForSequenceClassification."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qvtune.checkpoint import folder, state
from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.convert.convert import convert
from qvtune.convert.merge.changes import LowRank
from qvtune.convert.proof import proof
from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow
from qvtune.errors import ProofError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.tasks import get_task
from qvtune.train.run_folder import trajectory_settings
from tests.support.tiny import make_model_folder

LABELS = ("no", "perhaps", "yes")
TEXTS = [("hello world", "be kind"), ("what does it do in python ?", "user"), ("name", "says the user")]
CLASSES = {"labels": LABELS}
SCORES = {"problem": "regression"}


def make_run(
    tmp_path: Path, base: Path, classification: dict[str, Any], dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """Writes ``tmp_path/run`` as training does, all values random; returns what training computes with, on one rank."""
    config = RunConfig.model_validate(
        {
            "task": "sequence_classification",
            "classification": classification,
            "run_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(base), "quantization": settings.pop("quantization", "nf4")},
            "adapter": settings.pop("adapter", {"rank": 4, "alpha": 6}),
            "train": {"max_steps": 3},
            "data": {"max_length": 64},
        }
    )
    task = get_task(config.task, config.classification)
    opened = open_base(base, config.model, dtype, "sdpa", config.adapter, task.head(seed=0))
    _, content = fill(opened, Whole(torch.device("cpu")), dtype)
    model = add_adapters(opened.model, config.adapter, str(base), 0, task.peft_task_type, opened.new_modules)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter += 0.1 * torch.randn_like(parameter)
    keys = ("value", "master", "exp_avg", "exp_avg_sq")
    gathered = {name: {key: parameter.detach().clone() for key in keys} for name, parameter in trainable(model)}
    peft_config = getattr(model, "peft_config", {}).get("default")
    trainer = state.TrainerState(step=3, trajectory=trajectory_settings(config))
    checkpoints = tmp_path / "run" / "checkpoints"
    folder.write(checkpoints, 3, lambda path: state.save(path, gathered, peft_config, trainer, content))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return task.objective(model).eval()


@torch.no_grad()
def logits_in_training(objective: Any, base: Path) -> torch.Tensor:
    """Of ``TEXTS``, packed."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [tokenizer(*pair) for pair in TEXTS]
    ids, types = (np.concatenate([one.get(name, []) for one in encoded]) for name in ("input_ids", "token_type_ids"))
    lengths = np.array([len(one["input_ids"]) for one in encoded])
    labels = np.full(len(ids), IGNORE_INDEX)
    labels[lengths.cumsum() - lengths] = 0  # any label
    row = PackedRow(*(values.astype(np.int32) for values in (ids, labels, lengths, types)))
    logits: torch.Tensor = objective(get_task("sequence_classification").collate([row], 0), return_logits=True)
    return logits


@torch.no_grad()
def logits_of_folder(merged: Path) -> tuple[torch.Tensor, Any]:
    """Of ``TEXTS``, padded, by plain transformers, which must find every weight."""
    model, found = AutoModelForSequenceClassification.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    batch = AutoTokenizer.from_pretrained(merged)(*zip(*TEXTS, strict=True), padding=True, return_tensors="pt")
    if getattr(model.config, "type_vocab_size", 2) < 2:
        del batch["token_type_ids"]
    return model.eval()(**batch).logits, model.config


@pytest.mark.parametrize(
    ("family", "quantization", "classification", "adapter"),
    [
        ("bert", "nf4", CLASSES, "lora"),
        ("bert", "none", CLASSES, "full"),
        ("bert", "nf4", CLASSES, "full"),
        ("roberta", "none", CLASSES, "lora"),
        ("roberta", "nf4", SCORES, "lora"),
        ("llama", "nf4", CLASSES, "lora"),
        ("llama", "none", SCORES, "lora"),
    ],
)
def test_a_merged_classifier_is_loaded_by_transformers(
    tmp_path: Path, family: str, quantization: str, classification: dict[str, Any], adapter: str
) -> None:
    """Every tensor in its place, the same logits, and what config.json says."""
    base = make_model_folder(tmp_path / family, family, dtype=torch.float32)
    section = {"method": "full"} if adapter == "full" else {"rank": 4, "alpha": 6}
    objective = make_run(tmp_path, base, classification, quantization=quantization, adapter=section)
    report = convert(tmp_path / "run", tmp_path / "merged")
    assert report.proof.passed and report.tensors["added"] == {"bert": 4, "roberta": 4, "llama": 1}[family]
    logits, config = logits_of_folder(tmp_path / "merged")
    torch.testing.assert_close(logits, logits_in_training(objective, base), rtol=1e-5, atol=1e-5)
    names = LABELS if classification is CLASSES else ("score",)
    assert config.id2label == dict(enumerate(names)) and config.label2id == {name: at for at, name in enumerate(names)}
    kind = "single_label_classification" if classification is CLASSES else "regression"
    assert config.problem_type == kind and config.pad_token_id == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card


@pytest.mark.parametrize(("family", "dtype"), [("bert", torch.float32), ("llama", torch.float32)])
def test_the_card_of_an_adapter_says_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """The head has its size, and neither it nor the pooler is quantized."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    base = make_model_folder(tmp_path / family, family, dtype=dtype, **no_dropout)
    objective = make_run(tmp_path, base, CLASSES, dtype)
    convert(tmp_path / "run", tmp_path / "adapter", format="adapter")
    monkeypatch.chdir(tmp_path)
    loaded: dict[str, Any] = {}
    exec((tmp_path / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("```")[0], loaded)
    batch = AutoTokenizer.from_pretrained(base)(*zip(*TEXTS, strict=True), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded["model"].train()(**batch).logits  # bitsandbytes has less exact kernels for eval mode on a CPU
    torch.testing.assert_close(logits, logits_in_training(objective, base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("labels", "added"), [(LABELS, 2), (("no", "yes"), 0), (("yes", "no"), 0)])
def test_the_head_of_the_base_gives_way(tmp_path: Path, labels: tuple[str, ...], added: int) -> None:
    """To one of other shapes, to one trained further, and to a new one for the labels in another order."""
    base = make_model_folder(tmp_path / "bert", "bert", dtype=torch.float32)
    of_base: Any = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    AutoModelForSequenceClassification.from_pretrained(base, **of_base).save_pretrained(base)
    objective = make_run(tmp_path, base, {"labels": labels}, quantization="none")
    report = convert(tmp_path / "run", tmp_path / "merged")
    assert report.tensors.get("added", 0) == added
    logits, config = logits_of_folder(tmp_path / "merged")
    torch.testing.assert_close(logits, logits_in_training(objective, base), rtol=1e-5, atol=1e-5)
    assert tuple(config.id2label.values()) == labels


def test_scores_are_compared_by_their_own_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One score has no distribution: neither KL nor the first choice would notice any difference."""
    base = make_model_folder(tmp_path / "roberta", "roberta")
    make_run(tmp_path, base, SCORES, torch.bfloat16)
    report = convert(tmp_path / "run", tmp_path / "merged")
    assert report.proof.limits == proof.ROUNDED_SCORES and report.proof.max_abs_difference > 0
    monkeypatch.setattr(LowRank, "apply", lambda self, weight: weight)
    with pytest.raises(ProofError):
        convert(tmp_path / "run", tmp_path / "other")
