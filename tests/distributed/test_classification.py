"""Classifiers on 1, 2 and 3 ranks against transformers, PEFT and scikit-learn in one process; stopping and going on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qvtune.config.data import SourceSection
from qvtune.config.schema import ClassificationSection, RunConfig
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.order import rows_of_step
from qvtune.model.families import FAMILIES
from qvtune.tasks import get_task
from tests.distributed.conftest import CLASSIFIERS, Results
from tests.distributed.reference import MULTIPLIERS
from tests.support.lab import MAX_GRAD_NORM, Lab, classifier

ROUNDING = 1e-5
PARAMETERS = ("weight", "bias")
LABELS = ("no", "perhaps", "yes")


@pytest.fixture(scope="module")
def launches(one: Results, two: Results, three: Results) -> dict[str, Results]:
    return {"on-one": one, "on-two": two, "on-three": three}


class Reference:
    """A run without this project's model, loss, loop and metrics."""

    def __init__(self, lab: Lab, family: str, kind: str, changes: dict[str, Any]) -> None:
        self.is_regression = kind == "scores"
        self.config = RunConfig.model_validate(lab.config("reference", **classifier(lab, family, kind), **changes))
        labels = None if self.is_regression else LABELS
        section = ClassificationSection(labels=labels, problem=self.config.classification.problem)
        self._task, self._cache = get_task("sequence_classification", section), lab.folder / "tokens"
        data = self.config.data
        self.rows = self._rows(data.train_sources[0])
        self.eval_rows = self._rows(next(iter(data.eval_sets.values()))[0])
        self.model = self._model(lab.folder / family)

    def _rows(self, source: SourceSection) -> TokenRows:
        tokenizer = AutoTokenizer.from_pretrained(self.config.model.name_or_path)
        return build_token_rows(source, self.config.data, tokenizer, self._task, self._cache)

    def _documents(self, rows: TokenRows, index: int) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        """Inputs of a row's documents, and the index of the class or the score of each."""
        row = rows[index]
        for length, end in zip(row.document_lengths, row.document_lengths.cumsum(), strict=True):
            label = row.labels[end - length]
            lists = {"input_ids": row.input_ids}
            if len(row.token_type_ids) and self.config.model.name_or_path.endswith("/bert"):
                lists["token_type_ids"] = row.token_type_ids
            inputs = {name: torch.from_numpy(ids[end - length : end]).long()[None] for name, ids in lists.items()}
            yield inputs, float(label.view(np.float32)) if self.is_regression else int(label)

    def _model(self, folder: Path) -> Any:
        """What the method trains of q and v; new values as seed 0 draws them, a regression's bias at the mean label."""
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=1 if self.is_regression else len(LABELS)
        )
        family, method = FAMILIES[base.config.model_type], self.config.adapter.method
        targets = [family.projections["q"], family.projections["v"]]
        new = [name for name in ("bert.pooler", "classifier", "score") if _has(base, name)]
        if self.config.model.quantization == "nf4":
            _round_to_four_bits(base, but=[*new, *(targets if method == "full" else ())])
        torch.manual_seed(0)
        with torch.no_grad():
            for module in (part for name in new for part in base.get_submodule(name).modules()):
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=base.config.initializer_range)
        if self.is_regression:
            scores = [target for index in range(len(self.rows)) for _, target in self._documents(self.rows, index)]
            base.classifier.out_proj.bias.data.fill_(float(np.mean(scores)))
        if method in ("full", "bias"):
            ends = tuple(f"{target}.{'weight' if method == 'full' else 'bias'}" for target in targets)
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(name.endswith(ends) or name.startswith(tuple(new)))
            return base
        common: dict[str, Any] = {
            "task_type": "SEQ_CLS",
            "target_modules": targets,
            "modules_to_save": ["pooler"] if "bert.pooler" in new else None,
        }
        torch.manual_seed(0)
        if method == "ia3":
            return get_peft_model(base, IA3Config(feedforward_modules=[], **common))
        return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, use_dora=method == "dora", **common))

    def train(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms."""
        by_group: dict[float, list[Any]] = {1e-2: [], 4e-2: [], 2e-2: []}  # q, v, head
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                is_value = ".value." in name or ".v_proj." in name
                rate = 1e-2 if ".query." in name or ".q_proj." in name else 4e-2 if is_value else 2e-2
                by_group[rate].append(parameter)
        assert all(by_group.values())
        groups = [{"params": parameters, "rate": rate} for rate, parameters in by_group.items()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        trained = [parameter for parameters in by_group.values() for parameter in parameters]
        losses, norms = [], []
        for step, multiplier in enumerate(MULTIPLIERS):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * multiplier
            ids = rows_of_step(step, 6, len(self.rows), 0).tolist()
            loss = torch.stack([self._loss(*one) for index in ids for one in self._documents(self.rows, index)]).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, max_norm=MAX_GRAD_NORM)))
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, norms

    def _loss(self, inputs: dict[str, torch.Tensor], target: float) -> torch.Tensor:
        logits = self.model(**inputs).logits[0]
        if self.is_regression:
            return (logits[0] - target).square()
        return functional.cross_entropy(logits, torch.tensor(target))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The metrics by scikit-learn and SciPy, from all documents."""
        pairs = [pair for index in range(len(self.eval_rows)) for pair in self._documents(self.eval_rows, index)]
        assert len(pairs) == 13
        logits = np.stack([self.model(**inputs).logits[0].double().numpy() for inputs, _ in pairs])
        targets = np.array([target for _, target in pairs])
        if self.is_regression:
            return {
                "loss": float(np.square(logits[:, 0] - targets).mean()),
                "pearson": pearsonr(logits[:, 0], targets).statistic,
                "spearman": spearmanr(logits[:, 0], targets).statistic,
            }
        predicted = logits.argmax(1)
        return {
            "loss": log_loss(targets, functional.softmax(torch.from_numpy(logits), dim=1), labels=range(len(LABELS))),
            "accuracy": accuracy_score(targets, predicted),
            "f1": f1_score(targets, predicted, average="macro"),
            "matthews": matthews_corrcoef(targets, predicted),
        }


def _has(model: Any, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def _round_to_four_bits(model: Any, but: list[str]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not (name.startswith(tuple(but)) or name.endswith(tuple(but))):
            codes, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_training_and_metrics_equal_transformers_peft_and_scikit_learn(
    lab: Lab, launches: dict[str, Results], name: str
) -> None:
    """Losses, norms of gradients and metrics before and after training; metrics are the same bits on all ranks."""
    reference = Reference(lab, *CLASSIFIERS[name][:3])
    expected = reference.evaluate()
    losses, grad_norms = reference.train()
    trained = reference.evaluate()
    before = []
    for suffix in CLASSIFIERS[name].launches:
        run, results = f"{name}-{suffix}", launches[suffix]
        assert [result[run] for result in results] == [{"code": 0}] * len(results)
        assert lab.losses(run) == pytest.approx(losses, rel=ROUNDING)
        assert lab.grad_norms(run) == pytest.approx(grad_norms, rel=1e-4)  # a norm of differences of the above
        first, last = ({key: lab.events(run, "eval")[at][key] for key in expected} for at in (0, -1))
        assert first == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
        assert last == pytest.approx(trained, rel=1e-4, abs=1e-4)
        before.append(first)
    assert all(one == before[0] for one in before), "the same bits"


@pytest.mark.parametrize(("variant", "exactly"), [("stopped", True), ("stopped-on-three", False), ("zero2", False)])
def test_another_way_through_the_same_run(
    lab: Lab, two: Results, two_later: Results, three: Results, variant: str, exactly: bool
) -> None:
    """Stopped after step 3 and gone on with, on 2 ranks or on 3; ZeRO-2."""
    ended = {"stopped": two_later, "stopped-on-three": three, "zero2": two}[variant]
    assert all(result[f"bert-{variant}"] == {"code": 0} for result in ended)
    found, expected = (lab.losses(run) + lab.grad_norms(run) for run in (f"bert-{variant}", "bert-on-two"))
    if exactly:
        assert found == expected
    assert found == pytest.approx(expected, rel=1e-4)


def test_patience_ends_a_run_and_survives_a_resume(lab: Lab, two: Results, two_later: Results) -> None:
    """Two evaluations without a better accuracy than before training, one of them before the run was stopped."""
    assert [result["bert-early"] for result in two] == [{"code": 75}] * 2
    assert [result["bert-early"] for result in two_later] == [{"code": 0}] * 2
    assert [entry["step"] for entry in lab.events("bert-early", "eval")] == [0, 1, 2]
    assert len({entry["accuracy"] for entry in lab.events("bert-early", "eval")}) == 1
    ends = [(entry["step"], entry["reason"]) for entry in lab.events("bert-early", "run_end")]
    assert ends == [(1, "stopped"), (2, "completed")]
    checkpoints = lab.run_dir("bert-early") / "checkpoints"
    assert {name: (checkpoints / name).resolve().name for name in ("latest", "best")} == {
        "latest": "step-00000002",
        "best": "step-00000001",
    }


def test_a_checkpoint_is_a_classifier_for_peft(lab: Lab, two: Results) -> None:
    """Read by PEFT as it is, the head among ``modules_to_save``; a matrix that was trained itself is in a file of its
    own, with the head."""
    reference = Reference(lab, *CLASSIFIERS["bert"][:3])
    checkpoint = lab.run_dir("bert-on-two") / "checkpoints" / "latest"
    reference.model.load_adapter(checkpoint, "trained")
    reference.model.set_adapter("trained")
    last = lab.events("bert-on-two", "eval")[-1]
    found = reference.evaluate()
    assert found == pytest.approx({key: last[key] for key in found}, rel=ROUNDING, abs=ROUNDING)
    names = set(load_file(checkpoint / "adapter_model.safetensors"))
    heads = {f"base_model.model.{path}.{kind}" for path in ("bert.pooler.dense", "classifier") for kind in PARAMETERS}
    assert heads <= names and len(names) == len(heads) + 8
    assert two[0]["bert-full"] == {"code": 0}
    full = load_file(lab.run_dir("bert-full") / "checkpoints" / "latest" / "trained.safetensors")
    assert {name.removeprefix("base_model.model.") for name in heads} <= set(full) and len(full) == len(heads) + 4
