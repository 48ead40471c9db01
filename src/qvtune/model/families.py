"""The model families that can be trained, and why others cannot.

A family is in the table when its forward, its loss and its adapters' gradients have been compared with transformers,
PEFT and bitsandbytes in tests. Others may differ in what the loss has to know (scaled logits) or in what adapters need
(fused projections), so they are refused rather than trained wrongly.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qvtune.config.schema import AdapterSection
from qvtune.model.head import is_head_tensor
from qvtune.storage.safetensors import COMPUTED

_DECODER = {letter: f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")}
_ENCODER = {"q": "query", "k": "key", "v": "value", "o": "attention.output.dense"}


@dataclass(frozen=True)
class Family:
    """``projections``: what a user writes -> the end of a module's path. An encoder is loaded without a task's head;
    its feed-forward matrices are not in the table: one is called ``output.dense`` like the last one of the attention.

    ``positions_after_padding``: learned positions of tokens start behind the position of the padding.
    """

    projections: Mapping[str, str]
    is_encoder: bool = False
    positions_after_padding: bool = False


FAMILIES = {
    "llama": Family(_DECODER),
    "mistral": Family(_DECODER),
    "qwen2": Family(_DECODER),
    "qwen3": Family(_DECODER),
    "gemma3_text": Family(_DECODER),
    "bert": Family(_ENCODER, is_encoder=True),
    "roberta": Family(_ENCODER, is_encoder=True, positions_after_padding=True),
}

_EXPERTS = (
    "its experts are stored one by one and fused by transformers while loading, so no rank could read just its part of "
    "them; give a dense model"
)
_REFUSED = {
    "phi3": "its q, k and v are one matrix (qkv_proj), so they cannot be trained apart; give a checkpoint whose "
    "projections were split into q_proj, k_proj and v_proj, saved as model_type 'llama'",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gemma2": "it caps its attention scores and its logits, which neither sdpa nor the loss applies; give a Gemma 3 "
    "text model (model_type 'gemma3_text')",
    "gemma3": "it holds an image tower beside the language model; give a text-only checkpoint of Gemma 3 (model_type "
    "'gemma3_text')",
}

# Settings that change logits or attention in a way that this project does not compute -> the value that changes nothing
# (None never does), and the effect of all others.
_NOT_COMPUTED = {
    "final_logit_softcapping": (None, "caps the logits, which the loss does not"),
    "logit_scale": (1, "scales the logits, which the loss does not"),
    "logits_scaling": (1, "scales the logits, which the loss does not"),
    "lm_head_multiplier": (1, "scales the logits, which the loss does not"),
    "attn_logit_softcapping": (None, "caps the attention scores, which sdpa does not"),
    "use_bidirectional_attention": (False, "lets a token see those after it, so there is nothing to predict"),
}


def obstacles(config: Any) -> list[str]:
    """Why a model of this transformers configuration cannot be trained, and what to do; empty when it can."""
    family = config.model_type
    if family in _REFUSED:
        return [f"model_type is {family!r}: {_REFUSED[family]}"]
    if family not in FAMILIES:
        return [f"model_type is {family!r}; supported: {', '.join(FAMILIES)}"]
    return [
        f"{name} = {value!r} {effect}; give a model without it"
        for name, (neutral, effect) in _NOT_COMPUTED.items()
        if (value := getattr(config, name, None)) not in (None, neutral)
    ]


def family_of(model: Any) -> Family:
    """The family of a transformers model that ``obstacles`` let through."""
    return FAMILIES[model.config.model_type]


def trained_matrices(adapter: AdapterSection, family: Family) -> tuple[str, ...]:
    """Ends of the paths of the modules whose own weight is trained, and so is not quantized; none with factors."""
    chosen = (family.projections.get(letter) for letter in adapter.projections if adapter.method == "full")
    return tuple(module for module in chosen if module is not None)


def ends_in(path: str, ends: Iterable[str]) -> bool:
    """Whether a module's path has one of ``ends`` as its last words."""
    return f".{path}".endswith(tuple(f".{end}" for end in ends))


def names_of_base(stored: Iterable[str], family: str, *, has_head: bool) -> dict[str, str]:
    """Name in the model -> name in a checkpoint, of what is read.

    With ``has_head`` the model is one for sequence classification, whose head is no part of the base.
    """
    if FAMILIES[family].is_encoder:
        return encoder_names(stored, family)
    return {name: name for name in stored if not (has_head and is_head_tensor(name))}


def encoder_names(stored: Iterable[str], family: str) -> dict[str, str]:
    """Name in the bare encoder -> name in a checkpoint; what belongs to another task's head is left out.

    Checkpoints of a task have the encoder under ``bert.`` or ``roberta.``, those of the encoder alone do not. The
    oldest (bert-base-uncased) call weight and bias of a layer norm ``gamma`` and ``beta``.
    """
    stored, prefix = [name for name in stored if not name.endswith(COMPUTED)], f"{family}."
    if any(name.startswith(prefix) for name in stored):
        own = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
    else:
        own = {name: name for name in stored if not is_head_tensor(name)}
    old = {"gamma": "weight", "beta": "bias"}
    return {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: old[found[0]], new): name for new, name in own.items()
    }
