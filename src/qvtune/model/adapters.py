"""Which parameters are trained: PEFT's adapters on the chosen projections, or their own matrices or biases."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvtune.config.schema import AdapterSection
from qvtune.errors import UserError
from qvtune.model.families import FAMILIES, Family, ends_in, family_of
from qvtune.model.head import HEADS, POOLER

HEAD = "head"
PROJECTIONS = tuple(FAMILIES["llama"].projections)  # what a user writes, the same for every family
_LETTER_OF = {module: letter for family in FAMILIES.values() for letter, module in family.projections.items()}
GROUPS = (*PROJECTIONS, HEAD)  # what a trained parameter can belong to
FACTORS = ("A", "B", "magnitude", "bias")  # what it can be there
_HEAD_NAME = re.compile(rf"(?:^|\.)(?:{'|'.join((*HEADS, POOLER))})\.")
_TRAINED_NAME = re.compile(
    rf"\.(?P<module>{'|'.join(map(re.escape, _LETTER_OF))})"
    r"\.(?:(?P<bias>bias)|ia3_l\.default|(?:lora_(?P<factor>[AB]|magnitude)(?:_vector)?\.default\.)?weight)$"
)


def add_adapters(
    base: nn.Module,
    adapter: AdapterSection,
    base_name: str,
    seed: int,
    task_type: str | None = None,
    new_modules: Sequence[str] = (),
) -> nn.Module:
    """Make the chosen projections trainable, and nothing else: ``base`` in a ``PeftModel`` with factors beside them.

    Nothing else but ``new_modules``, paths of a task's head: PEFT trains a copy of each, its ``modules_to_save``.

    The initial values depend on ``seed`` alone, so all ranks make the same ones. Factors have the base's compute dtype.
    ``task_type`` is PEFT's, which chooses the class of the PeftModel and is saved; None: the plain one.
    With ``adapter.method: full`` or ``bias`` it is ``base`` itself, whose matrices or biases become trainable.

    Raises UserError naming every chosen projection that the model does not have, or that has no bias to train.
    """
    from peft import get_peft_model

    _require_projections(base, adapter)
    if adapter.method in ("full", "bias"):
        _train_own_parameters(base, adapter)
        for path in new_modules:
            base.get_submodule(path).requires_grad_(True)
        return base
    names = [path.rpartition(".")[2] for path in new_modules]  # PEFT adds those of heads for their task type
    common: dict[str, Any] = {
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "modules_to_save": [name for name in names if task_type != "SEQ_CLS" or name not in HEADS] or None,
    }
    config = _peft_config(adapter, family_of(base), common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model


def _peft_config(adapter: AdapterSection, family: Family, common: dict[str, Any]) -> Any:
    """PEFT's configuration of a method that trains parameters beside the base; ``common``: what is the same in each."""
    from peft import IA3Config, LoraConfig

    common = {**common, "target_modules": [family.projections[letter] for letter in adapter.projections]}
    if adapter.method == "ia3":
        down = [family.projections["down"]] if "down" in adapter.projections else []
        return IA3Config(feedforward_modules=down, **common)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r; its annotation says int
        lora_dropout=adapter.dropout,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        **common,
    )
    if adapter.method == "dora":
        from qvtune.model.dora import DoraLinear

        config._register_custom_module({nn.Linear: DoraLinear})
    return config


def _require_projections(base: nn.Module, adapter: AdapterSection) -> None:
    family = family_of(base)
    paths = [path for path, _ in base.named_modules()]
    present = {
        letter: module
        for letter, module in family.projections.items()
        if any(ends_in(path, [module]) for path in paths)
    }
    problems = []
    for letter in adapter.projections:
        if letter not in family.projections:
            problems.append(
                f"adapter.projections: {letter!r} is a matrix of a decoder's MLP, and this model is an encoder; "
                f"allowed: {', '.join(present)}"
            )
        elif letter not in present:
            problems.append(
                f"adapter.projections: {letter!r} is {family.projections[letter]}, which this model does not have; it "
                f"has {', '.join(present.values()) or 'none of them'}"
            )
    if problems:
        raise UserError(problems)


def _train_own_parameters(base: nn.Module, adapter: AdapterSection) -> None:
    """Make matrices, biases or both of the chosen projections trainable."""
    family, without = family_of(base), []
    for letter in adapter.projections:
        module = family.projections[letter]
        layers: list[Any] = [layer for path, layer in base.named_modules() if ends_in(path, [module])]
        if adapter.trains_biases and any(layer.bias is None for layer in layers):
            without.append(f"{letter} ({module})")
        for layer in layers:
            layer.weight.requires_grad_(adapter.method == "full")
            if adapter.trains_biases and layer.bias is not None:
                layer.bias.requires_grad_(True)
    if without:
        raise UserError(
            f"adapter.method: {adapter.method} is to train biases, and this model has none in {', '.join(without)}; "
            "choose others in adapter.projections, or another method"
        )


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside of what ``add_adapters`` has returned."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def is_of_head(parameter_name: str) -> bool:
    """Whether a parameter belongs to a head, or to the pooler before it."""
    return bool(_HEAD_NAME.search(parameter_name))


def group_and_factor(parameter_name: str) -> tuple[str, str | None]:
    """``"...layers.0.self_attn.v_proj.lora_B.default.weight"`` -> ``("v", "B")``, of ``GROUPS`` and of ``FACTORS``.

    A matrix itself is no factor, nor is a vector of (IA)^3. Parameters of a head, and of the pooler that belongs to it,
    are in the group ``head``.
    """
    match = _TRAINED_NAME.search(parameter_name)
    if match is None:
        assert is_of_head(parameter_name), parameter_name
        return HEAD, None
    return _LETTER_OF[match["module"]], match["factor"] or match["bias"]


def saved_name(parameter_name: str) -> str:
    """The name of a parameter in a checkpoint: that of PEFT's files; a matrix of the base has the base's own."""
    name = parameter_name.replace(".modules_to_save.default.", ".")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".default.weight", ".weight").replace(".ia3_l.default", ".ia3_l")
