"""Names of an adapter's tensors, brought together with those of a base's files.

An adapter speaks of modules of the model that was trained (``transformer.h.0.attn.c_attn``), a file may lack the prefix
of the model's inner part (``h.0.attn.c_attn.weight``) or have it where the adapter's model had none; transformers
loads both.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

_Value = TypeVar("_Value")
_FACTORS = r"lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta|ia3_l"
_ADAPTER_NAME = re.compile(
    r"\.(?:lora_[AB]\.([^.]+)\.(?:weight|bias)|modules_to_save\.([^.]+)\.(?=.*(?:weight|bias)$))"
)
_HEADS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.")
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}  # of the oldest BERT checkpoints


def plain_keys(stored: Mapping[str, _Value]) -> dict[str, _Value]:
    """The tensors by module of the trained model, whatever wrapped it: ``model.layers.0.mlp.up_proj.lora_A.weight``.

    PEFT's files have ``base_model.model.`` before that; those of DeepSpeed and older PEFT also the adapter's name and
    the wrappers of modules that were trained or adapted. Frozen originals of such modules are left out.
    """
    named = {name for key in stored for match in _ADAPTER_NAME.finditer(key) for name in match.groups() if name}
    adapter = "|".join(map(re.escape, sorted(named - {"weight", "bias"}))) or "default"
    plain = {}
    for key, value in stored.items():
        if ".original_module." in key:
            continue
        name = re.sub(r"^(?:module\.|_orig_mod\.)*(?:base_model\.model\.)?", "", key)
        name = re.sub(rf"\.({_FACTORS}|modules_to_save)\.(?:{adapter})(?=\.|$)", r".\1", name)
        name = re.sub(r"\.(?:modules_to_save|base_layer)\.", ".", name)
        plain[name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")] = value
    return plain


def model_names(wanted: Iterable[str], base: Collection[str]) -> dict[str, str]:
    """Name in the trained model -> name in the base's files, for each tensor of ``base``.

    Of all prefixes that one of the two may have and the other not, the one under which most of ``wanted`` are found.
    """
    wanted = set(wanted)
    candidates = [dict(zip(base, base, strict=True))]
    candidates += [{_with_prefix(name, prefix): name for name in base} for prefix in _first_components(wanted)]
    candidates += [{name.removeprefix(f"{prefix}."): name for name in base} for prefix in _first_components(base)]
    best = max(candidates, key=lambda names: len(wanted & names.keys()))  # the first of equals: no prefix
    return {_new_norm(name): found for name, found in best.items()}


def _first_components(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names if "." in name})


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith(_HEADS) else f"{prefix}.{name}"


def _new_norm(name: str) -> str:
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: _OLD_NORMS[found[0]], name)
