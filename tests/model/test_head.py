"""The head of a classifier: what it starts from, and that the base is read as without one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from qvtune.config.schema import ModelSection
from qvtune.model.fingerprint import Fingerprint, require_unchanged
from qvtune.model.head import HeadSettings
from qvtune.model.loader import Base, fill, open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.quantize import quantize
from qvtune.model.shard import Whole
from tests.support.tiny import make_model_folder

LABELS = ("no", "perhaps", "yes")
CPU = Whole(torch.device("cpu"))


def opened(folder: Path, labels: tuple[str, ...] | None = LABELS, **start: Any) -> Base:
    return open_base(folder, ModelSection(), torch.float32, "sdpa", head=HeadSettings(labels, **start))


def filled(folder: Path, head: HeadSettings | None) -> tuple[Base, Fingerprint]:
    base = open_base(folder, ModelSection(), torch.float32, "sdpa", head=head)
    return base, fill(base, CPU, torch.float32)[1]


def values(base: Base) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": parameter
        for path in base.new_modules
        for name, parameter in base.model.get_submodule(path).named_parameters()
    }


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    """A BERT that classifies already, with all that such a folder has."""
    folder = make_model_folder(tmp_path / "bert", "bert")
    options: Any = {"id2label": dict(enumerate(LABELS)), "label2id": {label: at for at, label in enumerate(LABELS)}}
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_new_values_depend_on_the_seed_alone(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path / family, family)
    torch.manual_seed(1)
    first = values(opened(folder, seed=5))
    torch.manual_seed(2)
    drawn_without = torch.rand(3)
    torch.manual_seed(2)
    second, other = values(opened(folder, seed=5)), values(opened(folder, seed=6))
    assert torch.equal(torch.rand(3), drawn_without), "the caller's random numbers are left alone"
    assert first.keys() == second.keys() == other.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if name.endswith(".bias"):
            assert not value.any()
        else:
            assert not torch.equal(value, other[name])
            assert 0.1 < value.std() < 0.3, "the model's initializer_range is 0.2"


def test_what_is_new_is_neither_read_nor_quantized(tmp_path: Path) -> None:
    base, _ = filled(make_model_folder(tmp_path / "bert", "bert"), HeadSettings(LABELS))
    assert base.new_modules == ("bert.pooler", "classifier")
    assert base.head_note == "classifier: a new head, from train.seed; bert.pooler: new, the base has none"
    quantized = [name for name, module in base.model.named_modules() if isinstance(module, NF4Linear)]
    assert len(quantized) == 12 and not any(name.startswith(base.new_modules) for name in quantized)
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.model.config.problem_type == "single_label_classification"


def test_a_head_for_the_same_labels_is_gone_on_with(classifier_folder: Path) -> None:
    stored = load_file(classifier_folder / "model.safetensors")
    base = opened(classifier_folder)
    assert base.head_note == f"classifier: the head of {classifier_folder}"
    assert base.new_modules == ("classifier",), "the pooler is the folder's"
    for name, value in values(base).items():
        assert torch.equal(value, stored[name].float())


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (("yes", "perhaps", "no"), "is for other labels, or in another order: no, perhaps, yes (classification.labels"),
        (("no", "yes"), "has other shapes"),
    ],
)
def test_another_head_is_not_taken_and_it_is_said(classifier_folder: Path, labels: Any, why: str) -> None:
    base = opened(classifier_folder, labels)
    assert base.head_note.startswith("classifier: a new head, from train.seed; that of ") and why in base.head_note
    assert base.model.config.num_labels == len(labels)
    fill(base, CPU, torch.float32)


def test_generic_labels_say_nothing_of_the_order(classifier_folder: Path) -> None:
    config = json.loads((classifier_folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (classifier_folder / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    assert opened(classifier_folder).head_note == f"classifier: the head of {classifier_folder}"


@pytest.mark.parametrize(("family", "last"), [("bert", "classifier.bias"), ("roberta", "classifier.out_proj.bias")])
def test_regression_starts_at_the_mean(tmp_path: Path, family: str, last: str) -> None:
    base = opened(make_model_folder(tmp_path / family, family), None, mean=3.5)
    biases = {name: value for name, value in values(base).items() if name.endswith(".bias")}
    assert biases.pop(last).tolist() == [3.5] and not any(value.any() for value in biases.values())
    assert "its bias starts at the mean of the scores, 3.5" in base.head_note


def test_a_head_without_a_bias_says_that_it_starts_at_0(tmp_path: Path) -> None:
    base = opened(make_model_folder(tmp_path / "llama"), None, mean=3.5)
    assert base.head_note.endswith("it has no bias, so it has to learn the mean of the scores, 3.5")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_base_is_the_same_with_and_without_a_head(tmp_path: Path, family: str) -> None:
    """For a record of what was read first, and for a folder that was quantized once, whose manifest names all."""
    folder = make_model_folder(tmp_path / "source", family)
    quantize(folder, tmp_path / "nf4")
    for each in (folder, tmp_path / "nf4"):
        base, with_head = filled(each, HeadSettings(LABELS))
        _, without = filled(each, None)
        records = tmp_path / f"records-{each.name}"
        require_unchanged(base.weights, with_head, records)
        require_unchanged(base.weights, without, records)
        require_unchanged(base.weights, with_head, records)
        (record,) = records.iterdir()
        assert json.loads(record.read_text())["tensors"] == without | with_head


def test_old_checkpoints_store_positions_as_integers(tmp_path: Path) -> None:
    """bert-base-uncased and MiniLM do."""
    folder = make_model_folder(tmp_path / "bert", "bert")
    tensors = load_file(folder / "model.safetensors")
    positions = {"bert.embeddings.position_ids": torch.arange(256)[None]}
    save_file(tensors | positions, folder / "model.safetensors", metadata={"format": "pt"})
    base, content = filled(folder, HeadSettings(LABELS))
    assert len(values(base)) == 4 and not any("position_ids" in name for name in content)
