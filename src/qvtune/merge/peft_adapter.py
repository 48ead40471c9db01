"""Reading what PEFT has saved: adapter_config.json and its tensors, checked against the base."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qvtune.base.source import StoredTensor
from qvtune.errors import UserError
from qvtune.merge.adapter import Adapter, LowRank

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Whatever of PEFT's LoRA makes the update something else than scaling * B A of each target module.
_OTHER_FORMULAS = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def peft_adapter(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, torch.Tensor], base: Mapping[str, StoredTensor]
) -> Adapter:
    """The adapter of PEFT's ``config`` and ``stored`` tensors, which fits ``base`` in every name and shape.

    ``path`` is where the tensors come from. Raises UserError with all that is wrong: factors that are missing, unknown,
    mis-shaped, empty or not finite, and kinds of adapter whose update is not ``scaling * B A``.
    """
    expected = _expected_shapes(config, base)
    problems = _config_problems(path.parent / "adapter_config.json", config)
    problems += [f"{path}: {problem}" for problem in _tensor_problems(stored, expected)]
    if problems:
        raise UserError([*problems, "the adapter and the base (model.name_or_path of the run) must belong together"])
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    changes = {
        name: LowRank(stored[_key(name, "A")], stored[_key(name, "B")], scaling)
        for name in (_base_name(key) for key in expected if key.endswith(".lora_A.weight"))
    }
    return Adapter(changes, next(iter(stored.values())).dtype, peft_config=config)


def _config_problems(path: Path, config: Mapping[str, Any]) -> list[str]:
    problems = [f"{path}: {key} is {config[key]!r}: cannot be merged" for key in _OTHER_FORMULAS if config.get(key)]
    if config["peft_type"] != "LORA":
        problems.append(f"{path}: peft_type is {config['peft_type']!r}; can be merged: LORA")
    if config["bias"] != "none":
        problems.append(f"{path}: bias is {config['bias']!r}; can be merged: none")
    return problems


def _expected_shapes(config: Mapping[str, Any], base: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Key and shape of every factor that the configuration promises for the base's matrices."""
    shapes = {}
    for name, tensor in base.items():
        if name.endswith(".weight") and name.split(".")[-2] in config["target_modules"]:
            num_out, num_in = tensor.shape
            shapes[_key(name, "A")] = (config["r"], num_in)
            shapes[_key(name, "B")] = (num_out, config["r"])
    return shapes


def _tensor_problems(stored: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for key in sorted(expected.keys() - stored.keys()):
        yield f"{key} {list(expected[key])} is missing"
    for key, tensor in sorted(stored.items()):
        if tensor.numel() == 0:
            yield f"{key} is empty, {list(tensor.shape)}"
        elif key not in expected:
            what = "matches no target module of the base" if _KEY.fullmatch(key) else "is not a LoRA factor"
            yield f"{key} {list(tensor.shape)} {what}"
        elif tuple(tensor.shape) != expected[key]:
            yield f"{key} has shape {list(tensor.shape)}, the base needs {list(expected[key])}"
        elif not tensor.isfinite().all():
            yield f"{key} holds values that are not finite"
    if len(dtypes := Counter(tensor.dtype for tensor in stored.values())) > 1:
        found = ", ".join(f"{count} x {dtype}" for dtype, count in dtypes.items())
        yield f"holds several dtypes ({found}), expected one"


def _key(base_name: str, factor: str) -> str:
    return f"base_model.model.{base_name.removesuffix('.weight')}.lora_{factor}.weight"


def _base_name(key: str) -> str:
    match = _KEY.fullmatch(key)
    assert match is not None, key
    return f"{match['module']}.weight"
