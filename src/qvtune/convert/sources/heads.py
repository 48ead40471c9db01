"""Output heads and embeddings whose merge changes config.json: heads of other tasks, tied embeddings that untie.

Tied embeddings are one tensor in the base. PEFT adapts or copies one module and leaves the other as it was, so the two
differ after training. ``merge_and_unload`` keeps them tied, which is not the model that was trained; here they are
untied.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvtune.convert.merge.changes import Change, Replaced, RowsReplaced
from qvtune.convert.sources.peft_config import HEAD_TASKS
from qvtune.data.batch import padding_token
from qvtune.errors import UserError
from qvtune.model.families import FAMILIES
from qvtune.model.head import HeadSettings
from qvtune.storage.safetensors import StoredTensor, TensorFiles

OUTPUT = "lm_head.weight"
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_LANGUAGE_HEADS = ("lm_head.", "cls.")
_HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def is_other_head(name: str, task_type: str | None) -> bool:
    """Whether a tensor of the base belongs to a head that a model of PEFT's ``task_type`` does not have."""
    return task_type in HEAD_TASKS and name.startswith(_LANGUAGE_HEADS)


def head_settings(task_type: str | None, changes: Mapping[str, Change], base: Path) -> dict[str, Any]:
    """Settings that config.json of the model folder ``base`` needs for the head of PEFT's ``task_type``.

    Raises UserError where the adapter has no such head: the merged model would get a randomly initialised one.
    """
    if task_type not in HEAD_TASKS:
        return {}
    config = _read_config(base)
    head = next((change for name, change in changes.items() if name.endswith(_HEAD_WEIGHTS)), None)
    if task_type != "QUESTION_ANS" and not isinstance(head, Replaced):
        raise UserError(
            f"task_type is {task_type}, but no head was saved ({', '.join(_HEAD_WEIGHTS)}); the merged model would get "
            "a random one. Name the head in modules_to_save before training"
        )
    settings: dict[str, Any] = {}
    if architectures := config.get("architectures"):
        stem = architectures[0].partition("For")[0].removesuffix("Model")
        settings["architectures"] = [stem + HEAD_TASKS[task_type]]
    if isinstance(head, Replaced) and len(config.get("id2label") or ()) != (num_labels := head.tensor.shape[0]):
        labels = [f"LABEL_{index}" for index in range(num_labels)]
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    return settings


def trained_head(trajectory: Mapping[str, Any]) -> HeadSettings | None:
    """The head that a run of ours has trained, by the settings in its checkpoint; None where its task has none."""
    if trajectory.get("task") != "sequence_classification":
        return None
    labels = trajectory["classification"]["labels"]
    return HeadSettings(None if labels is None else tuple(labels))


def classifier_settings(head: HeadSettings, base: Path) -> dict[str, Any]:
    """Settings of config.json that make the model folder ``base`` one that classifies.

    A decoder also gets a padding token: transformers takes the last token that is none as the end of a text.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    family = _read_config(base)["model_type"]
    settings = head.as_config() | {"architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family]]}
    if not FAMILIES[family].is_encoder:
        settings["pad_token_id"] = padding_token(AutoTokenizer.from_pretrained(base))
    return settings


def untie(
    trained_tied: bool, changes: dict[str, Change], names: Mapping[str, str], base: Mapping[str, StoredTensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The output matrix to add and config.json's settings where tied embeddings have to be untied, else nothing.

    ``trained_tied``: PEFT's ensure_weight_tying. ``names``: name in the trained model -> name in ``base``. Removes the
    output matrix from ``changes`` where it is not a tensor of the merged model or is added.
    """
    source = input_of(names)
    if source is None or not _is_tied(base, names):
        return {}, {}
    to_input, to_output = changes.get(source), changes.get(OUTPUT)
    if to_input is None and to_output is None:
        return {}, {}
    if _stays_tied(to_input, to_output, trained_tied):
        changes.pop(OUTPUT, None)
        return {}, {}
    if trained_tied:
        raise UserError(
            "ensure_weight_tying with LoRA on both embeddings cannot be merged; use modules_to_save for them"
        )
    settings = {"tie_word_embeddings": False}
    if OUTPUT in names:  # the file stores the output matrix too
        return {}, settings
    weight = _read(base[names[source]])
    change = changes.pop(OUTPUT, None)
    return {OUTPUT: weight if change is None else change.apply(weight.float())}, settings


def input_of(names: Iterable[str]) -> str | None:
    """The name of the input embeddings."""
    return next((name for name in names if name.endswith(_INPUTS)), None)


def _is_tied(base: Mapping[str, StoredTensor], names: Mapping[str, str]) -> bool:
    config = _read_config(next(iter(base.values())).file.parent)
    return bool(config.get("tie_word_embeddings", OUTPUT not in names))


def _stays_tied(to_input: Change | None, to_output: Change | None, trained_tied: bool) -> bool:
    if isinstance(to_input, Replaced) and isinstance(to_output, Replaced):
        return torch.equal(to_input.tensor, to_output.tensor)
    if isinstance(to_input, RowsReplaced):  # PEFT's trained tokens are used by both
        return to_output is None
    return trained_tied and to_output is None


def _read(stored: StoredTensor) -> Tensor:
    if stored.file.suffix != ".safetensors":
        raise UserError(f"{stored.file}: the adapter unties the embeddings, for which the base must be in safetensors")
    weights = TensorFiles(stored.file.parent, {stored.name: stored})
    return weights.read(stored.name).view(stored.shape)


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
