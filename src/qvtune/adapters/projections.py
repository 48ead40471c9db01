"""Which matrices are trained: adapters from PEFT on the chosen attention projections."""

import re

import torch
from torch import nn

from qvtune.base.families import FAMILIES, family_of
from qvtune.config.schema import AdapterSection
from qvtune.errors import UserError

PROJECTIONS = tuple(FAMILIES["llama"].projections)  # q, k, v, o: what a user writes, the same for every family
_LETTER_OF = {module: letter for family in FAMILIES.values() for letter, module in family.projections.items()}
_TRAINED_NAME = re.compile(
    rf"\.(?P<module>{'|'.join(map(re.escape, _LETTER_OF))})\.lora_(?P<factor>[AB])\.default\.weight$"
)


def add_adapters(base: nn.Module, adapter: AdapterSection, base_name: str, seed: int) -> nn.Module:
    """Wrap ``base`` in a ``PeftModel`` whose only trainable parameters are the factors of the chosen projections.

    The initial values depend on ``seed`` alone, so all ranks make the same ones. Factors have the base's compute dtype.

    Raises UserError naming every chosen projection that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    family = family_of(base)
    paths = [f".{name}" for name, _ in base.named_modules()]
    present = [module for module in family.projections.values() if any(path.endswith(f".{module}") for path in paths)]
    problems = [
        f"adapter.projections: {letter!r} is {family.projections[letter]}, which this model does not have; "
        f"it has {', '.join(present) or 'none of them'}"
        for letter in adapter.projections
        if family.projections[letter] not in present
    ]
    if problems:
        raise UserError(problems)
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION" if family.is_encoder else "CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r; its annotation says int
        lora_dropout=adapter.dropout,
        use_rslora=adapter.method == "rslora",
        target_modules=[family.projections[letter] for letter in adapter.projections],
        base_model_name_or_path=base_name,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def projection_and_factor(parameter_name: str) -> tuple[str, str]:
    """``"...layers.0.self_attn.v_proj.lora_B.default.weight"`` -> ``("v", "B")``."""
    match = _TRAINED_NAME.search(parameter_name)
    assert match is not None, parameter_name
    return _LETTER_OF[match["module"]], match["factor"]


def projection_pattern(letter: str) -> str:
    """A regular expression that finds a projection's module, whatever the family calls it, in a parameter's name."""
    modules = [re.escape(module) for module, owner in _LETTER_OF.items() if owner == letter]
    return rf"\.(?:{'|'.join(modules)})\."


def saved_name(parameter_name: str) -> str:
    """The name under which PEFT stores a parameter in ``adapter_model.safetensors``."""
    return parameter_name.replace(".default.weight", ".weight")
