"""The classification head: what it is called in transformers, what it starts from, and what config.json says of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvtune.storage.safetensors import TensorFiles

HEADS = ("classifier", "score")  # of encoders, of decoders; PEFT trains and saves these for its task type SEQ_CLS
POOLER = "pooler"
_SCORE = "score"  # the name of a regression's only output


@dataclass(frozen=True)
class HeadSettings:
    """What a head is made for, and what a new one starts from.

    ``labels``: names of the classes in the order of the outputs; None for regression, which has one output.
    ``seed``: of the values of a new head. ``mean``: what regression predicts before training, where the head has a
    bias; raw scores are far from 0, and a head that starts there learns little else than their mean.
    """

    labels: tuple[str, ...] | None
    seed: int = 0
    mean: float | None = None

    def as_config(self) -> dict[str, Any]:
        """What config.json says of such a head."""
        names = (_SCORE,) if self.labels is None else self.labels
        return {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "regression" if self.labels is None else "single_label_classification",
        }

    def apply_to(self, config: Any) -> None:
        """Let transformers build a model with this head."""
        settings = self.as_config()
        config.update(settings | {"id2label": {int(index): name for index, name in settings["id2label"].items()}})


def is_head_tensor(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a head: to one of classes, or to one of words."""
    return name.startswith(("cls.", "lm_head.", *(f"{head}." for head in HEADS)))


def head_path(model: Any) -> str:
    """Path of the head in transformers' model for sequence classification."""
    (path,) = (name for name in HEADS if hasattr(model, name))
    return path


def make_new_modules(
    model: Any, weights: TensorFiles, head: HeadSettings, stored_labels: Iterable[str], dtype: torch.dtype
) -> tuple[tuple[str, ...], str]:
    """Fill what the checkpoint ``weights`` need not have: the head, and the pooler where it has none.

    ``model``: transformers' model for sequence classification on the meta device. New values are drawn as transformers
    draws them, on the CPU in float32: they depend on the seed alone. The head is the checkpoint's own where that has
    the same shapes and, by its ``stored_labels``, the same classes.

    Returns the paths of these modules, and for the log what they start from.
    """
    path, pooler = head_path(model), f"{model.base_model_prefix}.{POOLER}"
    has_pooler = hasattr(model.base_model, POOLER) and model.base_model.pooler is not None
    made_up = has_pooler and not any(f".{name}".endswith(f".{POOLER}.dense.weight") for name in weights)
    paths = (pooler, path) if made_up else (path,)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(head.seed)
        for new in paths:
            for part in model.get_submodule(new).to_empty(device="cpu").float().modules():
                model._init_weights(part)
    line = _read_stored_head(model.get_submodule(path), path, weights, head, tuple(stored_labels))
    for new in paths:
        model.get_submodule(new).to(dtype)
    return paths, f"{line}; {pooler}: new, the base has none" if made_up else line


@torch.no_grad()
def _read_stored_head(
    module: nn.Module, path: str, weights: TensorFiles, head: HeadSettings, stored_labels: tuple[str, ...]
) -> str:
    parameters = {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
    stored = {name: weights[name].shape for name in weights if name.startswith(f"{path}.")}
    if not stored:
        return f"{path}: a new head, from train.seed{_start_at_mean(parameters, head)}"
    instead = f"{path}: a new head, from train.seed{_start_at_mean(parameters, head)}; that of {weights.folder} "
    if stored != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        return f"{instead}has other shapes"
    are_named = stored_labels != tuple(f"LABEL_{index}" for index in range(len(stored_labels)))
    if head.labels is not None and are_named and stored_labels != head.labels:
        found = ", ".join(stored_labels)
        return f"{instead}is for other labels, or in another order: {found} (classification.labels sets the order)"
    for name, parameter in parameters.items():
        parameter.copy_(weights.read(name).view(parameter.shape))
    return f"{path}: the head of {weights.folder}"


def _start_at_mean(parameters: Mapping[str, nn.Parameter], head: HeadSettings) -> str:
    """Set the last bias to the mean of the scores; says so."""
    if head.mean is None:
        return ""
    biases = [parameter for name, parameter in parameters.items() if name.endswith(".bias")]
    if not biases:
        return f"; it has no bias, so it has to learn the mean of the scores, {head.mean:.4g}"
    biases[-1].fill_(head.mean)
    return f"; its bias starts at the mean of the scores, {head.mean:.4g}"
