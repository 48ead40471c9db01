"""Heads of tasks: the merged model has the adapter's instead of the base's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvtune.convert.merge.changes import Change, Replaced
from qvtune.convert.sources.peft_config import HEAD_TASKS
from qvtune.errors import UserError

_LANGUAGE_HEADS = ("lm_head.", "cls.")
_HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def is_other_head(name: str, task: str | None) -> bool:
    """Whether a tensor of the base belongs to a head that a model for ``task`` (PEFT's task_type) does not have."""
    return task in HEAD_TASKS and name.startswith(_LANGUAGE_HEADS)


def head_settings(task: str | None, changes: Mapping[str, Change], base: Path) -> dict[str, Any]:
    """What config.json of a model for ``task`` says, beside what the base's in folder ``base`` does.

    Raises UserError where the adapter has not brought the head along: the merged model would get a random one.
    """
    if task not in HEAD_TASKS:
        return {}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    head = next((change for name, change in changes.items() if name.endswith(_HEAD_WEIGHTS)), None)
    if task != "QUESTION_ANS" and not isinstance(head, Replaced):
        raise UserError(
            f"task_type is {task}, but no head was saved ({', '.join(_HEAD_WEIGHTS)}); the merged model would get a "
            "random one. Name the head in modules_to_save before training"
        )
    settings: dict[str, Any] = {}
    if architectures := config.get("architectures"):
        stem = architectures[0].partition("For")[0].removesuffix("Model")
        settings["architectures"] = [stem + HEAD_TASKS[task]]
    if isinstance(head, Replaced) and len(config.get("id2label") or ()) != (num_labels := head.tensor.shape[0]):
        labels = [f"LABEL_{index}" for index in range(num_labels)]
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    return settings
