"""Which matrices are trained: adapters from PEFT on the chosen attention projections."""

import re

import torch
from torch import nn

from qvtune.config.schema import AdapterSection
from qvtune.errors import UserError

# The same names in every family of base.model.SUPPORTED_FAMILIES; the key is what a user writes.
PROJECTION_MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_PROJECTION_OF = {module: letter for letter, module in PROJECTION_MODULES.items()}
_TRAINED_NAME = re.compile(r"\.(?P<module>\w+)\.lora_(?P<factor>[AB])\.default\.weight$")


def add_adapters(base: nn.Module, adapter: AdapterSection, base_name: str, seed: int) -> nn.Module:
    """Wrap ``base`` in a ``PeftModel`` whose only trainable parameters are the factors of the chosen projections.

    The initial values depend on ``seed`` alone, so all ranks make the same ones. Factors have the base's compute dtype.

    Raises UserError naming every chosen projection that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    modules = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    problems = [
        f"adapter.projections: {letter!r} is {PROJECTION_MODULES[letter]}, which this model does not have; "
        f"it has {', '.join(sorted(modules & set(_PROJECTION_OF))) or 'none of them'}"
        for letter in adapter.projections
        if PROJECTION_MODULES[letter] not in modules
    ]
    if problems:
        raise UserError(problems)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r; its annotation says int
        lora_dropout=adapter.dropout,
        use_rslora=adapter.method == "rslora",
        target_modules=[PROJECTION_MODULES[letter] for letter in adapter.projections],
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
    assert match is not None and match["module"] in _PROJECTION_OF, parameter_name
    return _PROJECTION_OF[match["module"]], match["factor"]


def saved_name(parameter_name: str) -> str:
    """The name under which PEFT stores a parameter in ``adapter_model.safetensors``."""
    return parameter_name.replace(".default.weight", ".weight")
