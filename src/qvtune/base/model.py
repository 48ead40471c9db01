"""The skeleton of a base model: the Hugging Face architecture without weights, its matrices marked for NF4."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.base.nf4 import NF4Linear
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError

# Families whose forward has been compared with transformers in tests/base. Others may differ in what the loss has to
# know (logit scaling, fused projections), so they are refused rather than trained wrongly.
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def read_model_config(folder: Path, model: ModelSection) -> Any:
    """The folder's transformers configuration.

    Raises UserError when it cannot be read, needs code from the folder, is already quantized or of another family.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json: {error} (model.name_or_path, model.trust_remote_code)") from error
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UserError(
            f"{folder}/config.json: model_type is {config.model_type!r}; supported: {', '.join(SUPPORTED_FAMILIES)} "
            "(model.name_or_path)"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        if not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit")):
            raise UserError(
                f"{folder}/config.json: the weights are quantized by {quantization.get('quant_method')!r}; give the "
                "folder of the original weights, which are quantized while they are read, or one in bitsandbytes' "
                "4-bit format (model.name_or_path)"
            )
        del config.quantization_config  # the skeleton is ours
    return config


def build_skeleton(
    config: Any, model: ModelSection, dtype: torch.dtype, attention: str, stored: Collection[str] = ()
) -> nn.Module:
    """The causal language model with empty ("meta") parameters and real buffers.

    With ``model.quantization: nf4`` every ``nn.Linear`` but the output head becomes an ``NF4Linear``, the choice of
    QLoRA and of transformers' own 4-bit loading; where the checkpoint has matrices ``stored`` in 4 bits, just those.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=model.trust_remote_code
        )
    skeleton.tie_weights()  # type: ignore[operator]  # undone by the context, which makes a parameter anew where it is set
    if model.quantization == "nf4":
        head = skeleton.get_output_embeddings()  # type: ignore[operator]
        for name, module in list(skeleton.named_modules()):
            if type(module) is nn.Linear and (name in stored if stored else module is not head):
                skeleton.set_submodule(
                    name,
                    NF4Linear(
                        module.in_features,
                        module.out_features,
                        bias=module.bias is not None,
                        double_quant=model.double_quant,
                        dtype=dtype,
                    ),
                )
    return skeleton.requires_grad_(False)
