"""Logits, loss and gradients against transformers' own classifiers with PEFT, each document by itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from qvtune.config.schema import AdapterSection, ClassificationSection, ModelSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, empty_batch
from qvtune.data.packing import PackedRow
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import prepare_attention
from qvtune.model.families import FAMILIES
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.tasks import get_task
from qvtune.tasks.labels import encode_score
from qvtune.tasks.sequence_classification import ClassificationObjective
from tests.support.separate import separate
from tests.support.tiny import VOCABULARY, four_bit_config, make_model_folder
from tests.support.varlen_attention import VARLEN, register_varlen

CLASSES = ClassificationSection(labels=("bad", "fair", "good"))
SCORES = ClassificationSection(problem="regression")
LENGTHS = [(9, 1, 17, 5), (11, 13)]  # two rows; the second ends in padding
TARGETS = {"single_label": [2, 0, 1, 1, 0, 2], "regression": [4.5, 1.25, 3.0, 5.0, 2.5, 3.75]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = [
    *((family, quantization, CLASSES) for family in ("llama", "bert", "roberta") for quantization in ("nf4", "none")),
    *((family, "nf4", SCORES) for family in ("llama", "bert", "roberta")),
    ("gemma3_text", "nf4", CLASSES),
]


def rows(settings: ClassificationSection, *, with_types: bool) -> list[PackedRow]:
    """Random documents; with types, the second half of each is of the second text."""
    generator, targets = np.random.default_rng(0), iter(TARGETS[settings.problem])
    found = []
    for lengths in LENGTHS:
        labels, types = [], []
        for length in lengths:
            target = next(targets)
            label = encode_score(str(target)) if settings.problem == "regression" else int(target)
            labels += [label, *[IGNORE_INDEX] * (length - 1)]
            types += [int(index > length // 2) for index in range(length)]
        ids = generator.integers(3, VOCABULARY, sum(lengths))
        arrays = (ids, labels, lengths, types if with_types else [])
        found.append(PackedRow(*(np.array(values, np.int32) for values in arrays)))
    return found


def make(folder: Path, settings: ClassificationSection, quantization: str, attention: str = "sdpa") -> Any:
    """The objective as a run builds it."""
    task = get_task("sequence_classification", settings)
    section = ModelSection(quantization=quantization)  # type: ignore[arg-type]
    base = open_base(folder, section, torch.float32, attention, head=task.head(seed=0))
    fill(base, Whole(torch.device("cpu")), torch.float32)
    model = add_adapters(base.model, AdapterSection(rank=4), str(folder), 0, task.peft_task_type, base.new_modules)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(model):
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return task.objective(model).train()


def reference(objective: ClassificationObjective, folder: Path, settings: ClassificationSection, quant: str) -> Any:
    """transformers' model with PEFT's adapter, the same factors and the same head."""
    options: dict[str, Any] = {}
    if quant == "nf4":
        four_bit = four_bit_config()
        four_bit.llm_int8_skip_modules = ["classifier", "score", "bert.pooler"]  # what is trained
        options["quantization_config"] = four_bit
    num_labels = 1 if settings.problem == "regression" else 3
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=num_labels, **options
    )
    names = FAMILIES[base.config.model_type].projections
    new = ["pooler"] if base.config.model_type == "bert" else None  # the folder has none
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=32, target_modules=[names["q"], names["v"]], modules_to_save=new
    )
    model = get_peft_model(base, config).train()
    result = model.load_state_dict(dict(trainable(objective.model)), strict=False)
    assert not result.unexpected_keys
    return model


def reference_logits(model: Any, packed: Sequence[PackedRow]) -> torch.Tensor:
    """One document at a time, from the rows alone."""
    found = []
    for row in packed:
        for length, end in zip(row.document_lengths, row.document_lengths.cumsum(), strict=True):
            part = slice(end - length, end)
            options = {"token_type_ids": row.token_type_ids} if len(row.token_type_ids) else {}
            options["input_ids"] = row.input_ids
            inputs = {name: torch.from_numpy(values[part]).long()[None] for name, values in options.items()}
            found.append(model(**inputs).logits[0])
    return torch.stack(found)


def summed_loss(logits: torch.Tensor, settings: ClassificationSection) -> torch.Tensor:
    targets = torch.tensor(TARGETS[settings.problem])
    if settings.problem == "regression":
        return functional.mse_loss(logits[:, 0], targets, reduction="sum")
    return functional.cross_entropy(logits, targets, reduction="sum")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in trainable(model)}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Relative to the largest entry of each tensor: single entries can be sums that cancel."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5 * largest)


def folder_of(tmp_path: Path, family: str) -> Path:
    options = NO_DROPOUT if FAMILIES[family].is_encoder else {}
    return make_model_folder(tmp_path / family, family, dtype=torch.float32, **options)


@pytest.mark.parametrize(("family", "quantization", "settings"), CASES)
def test_it_equals_transformers_and_peft(
    tmp_path: Path, family: str, quantization: str, settings: ClassificationSection
) -> None:
    """Packed, and one document a row with padding."""
    folder = folder_of(tmp_path, family)
    objective = make(folder, settings, quantization)
    packed = rows(settings, with_types=family == "bert")
    model = reference(objective, folder, settings, quantization)
    expected_logits = reference_logits(model, packed)
    expected_loss = summed_loss(expected_logits, settings)
    expected_loss.backward()
    expected = gradients(model)
    num_head = {"bert": 4, "roberta": 4}.get(family, 1)
    assert len(expected) == 8 + num_head

    batch: Batch = get_task("sequence_classification", settings).collate(packed, 0)
    assert batch.num_label_tokens == 6
    for one in (batch, separate(batch)):
        objective.zero_grad()
        loss = objective(one)
        loss.backward()
        torch.testing.assert_close(objective(one, return_logits=True), expected_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_close(gradients(objective.model), expected)


@pytest.mark.parametrize("attention", ["eager", "varlen", VARLEN])
@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_every_attention_isolates_documents(tmp_path: Path, family: str, attention: str) -> None:
    """As sdpa does, packed and padded; without the documents' borders the logits would be others."""
    register_varlen()
    prepare_attention("varlen", deterministic=True)
    folder, task = folder_of(tmp_path, family), get_task("sequence_classification", CLASSES)
    batch = task.collate(rows(CLASSES, with_types=family == "bert"), 0)
    expected = make(folder, CLASSES, "nf4")(batch, return_logits=True)
    objective = make(folder, CLASSES, "nf4", attention)
    for one in (batch, separate(batch)):
        torch.testing.assert_close(objective(one, return_logits=True), expected, rtol=1e-5, atol=1e-5)
    borders = batch.cu_seqlens.clone()
    borders[3] += 3  # the third document sees three tokens of the next
    positions = torch.cat([torch.arange(size) for size in borders.diff().tolist()]).view_as(batch.position_ids)
    leaking = replace(batch, cu_seqlens=borders, position_ids=positions, max_seqlen=int(borders.diff().max()))
    assert (objective(leaking, return_logits=True)[2] - expected[2]).abs().max() > 1e-3


def test_without_documents_the_loss_is_zero_and_so_are_the_gradients(tmp_path: Path) -> None:
    """A rank without rows takes part in all that ZeRO-3 gathers."""
    objective = make(folder_of(tmp_path, "bert"), CLASSES, "none")
    loss = objective(empty_batch(0))
    loss.backward()
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(objective.model).values())


@pytest.mark.parametrize(("family", "longest"), [("bert", 256), ("roberta", 255), ("llama", None)])
def test_learned_positions_end(tmp_path: Path, family: str, longest: int | None) -> None:
    """The padding token is 0, so RoBERTa's first position is 1."""
    config = AutoConfig.from_pretrained(make_model_folder(tmp_path / family, family))
    task = get_task("sequence_classification", CLASSES)
    if longest is None:
        assert task.model_problems(config, 10**6) == []
        return
    assert task.model_problems(config, longest) == []
    (problem,) = task.model_problems(config, longest + 1)
    assert f"more than the {longest} positions of the model; set at most {longest}" in problem
