"""The skeleton of a base model: the Hugging Face architecture without weights, its linear layers ours."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.model.families import FAMILIES, ends_in, obstacles
from qvtune.model.head import HeadSettings
from qvtune.model.linear import FrozenLinear
from qvtune.model.nf4 import NF4Linear


def read_model_config(folder: Path, model: ModelSection) -> Any:
    """The folder's transformers configuration.

    Raises UserError when it cannot be read, needs code from the folder, is quantized in a format that is not read
    here, or describes a model that cannot be trained.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        trusted = f"model.trust_remote_code: {model.trust_remote_code}"
        raise UserError(f"{folder}/config.json: {error} ({trusted})") from error
    if problems := obstacles(config):
        raise UserError([f"{folder}/config.json: {problem}" for problem in problems])
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        if not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit")):
            raise UserError(
                f"{folder}/config.json: the weights are quantized by {quantization.get('quant_method')!r}; give the "
                "folder of the original weights, which are quantized while they are read, or one in bitsandbytes' "
                "4-bit format"
            )
        del config.quantization_config  # the skeleton is ours
    return config


def build_skeleton(
    config: Any,
    model: ModelSection,
    dtype: torch.dtype,
    attention: str,
    stored: Collection[str] = (),
    *,
    trained: tuple[str, ...] = (),
    with_pooler: bool = True,
) -> nn.Module:
    """The causal language model, or the bare encoder, with empty ("meta") parameters and real buffers.

    As ``freeze``. ``with_pooler`` concerns encoders only. Raises UserError where transformers cannot build the
    model.
    """
    skeleton = plain_skeleton(config, model, dtype, attention, with_pooler=with_pooler)
    return freeze(skeleton, model, dtype, stored, trained)


def freeze(
    skeleton: nn.Module,
    model: ModelSection,
    dtype: torch.dtype,
    stored: Collection[str] = (),
    trained: tuple[str, ...] = (),
) -> nn.Module:
    """Freeze ``skeleton``; each empty ``nn.Linear`` becomes a ``FrozenLinear``, with ``quantization: nf4`` a 4-bit one.

    Not the output head: the choice of QLoRA and of transformers' own 4-bit loading. Where the checkpoint has matrices
    ``stored`` in 4 bits, just those are NF4. A module whose path ends in one of ``trained`` stays as it is.
    """
    head = skeleton.get_output_embeddings()  # type: ignore[operator]  # an encoder has none
    for name, module in list(skeleton.named_modules()):
        if type(module) is not nn.Linear or not module.weight.is_meta or ends_in(name, trained):
            continue
        shape, has_bias = (module.in_features, module.out_features), module.bias is not None
        if model.quantization == "nf4" and (name in stored if stored else module is not head):
            layer: nn.Linear = NF4Linear(*shape, bias=has_bias, double_quant=model.double_quant, dtype=dtype)
        elif module is not head:
            layer = FrozenLinear(*shape, bias=has_bias, device="meta", dtype=dtype)
        else:
            continue
        skeleton.set_submodule(name, layer)
    return skeleton.requires_grad_(False)


def plain_skeleton(
    config: Any,
    model: ModelSection,
    dtype: torch.dtype,
    attention: str,
    *,
    with_pooler: bool = True,
    head: HeadSettings | None = None,
) -> nn.Module:
    """The transformers model with nothing of ours in it; with ``head`` that for sequence classification."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    is_encoder = FAMILIES[config.model_type].is_encoder
    options: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": model.trust_remote_code}
    architecture: Any = AutoModel if is_encoder else AutoModelForCausalLM
    if head is not None:
        architecture = AutoModelForSequenceClassification
        head.apply_to(config)
    elif is_encoder:
        options["add_pooling_layer"] = with_pooler
    with _model_errors(config, "build the model"):
        built: nn.Module = without_weights(architecture, config, dtype, **options)
    return built


def require_forward(config: Any, model: ModelSection, head: HeadSettings | None = None) -> None:
    """Run the model's forward once without memory, on the meta device, where shapes are all there is.

    Raises UserError where transformers' own code fails with this configuration, before anything of ours is involved.
    """
    skeleton = plain_skeleton(config, model, torch.float32, "sdpa", head=head).to("meta")
    if not type(skeleton).__module__.startswith("transformers."):
        return  # code of the model folder may look at values, which the meta device does not have
    with _model_errors(config, "run its forward"), torch.no_grad():
        skeleton(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"))


@contextmanager
def _model_errors(config: Any, doing: str) -> Iterator[None]:
    """Raise what transformers' code for a model raises as a UserError that says so."""
    try:
        yield
    except Exception as error:  # any error of the model's code is one of its configuration
        raise UserError(
            f"{config.name_or_path}/config.json: transformers cannot {doing}: {type(error).__name__}: {error}. The "
            f"model itself fails ({config.model_type}), without training; correct config.json or give another model"
        ) from error


def without_weights(auto_class: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The transformers model of a configuration, its parameters on the meta device, its buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype, **options)
    model.tie_weights()  # undone by the context, which makes a parameter anew where it is set
    return model
