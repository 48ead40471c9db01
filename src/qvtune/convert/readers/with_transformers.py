"""transformers, with PEFT for an adapter: loaded by the very lines of the model card."""

from typing import Any

import torch
import transformers

from qvtune.convert.readers.process import Answer, Request


def read(request: Request) -> Answer:
    """``arguments``: ``code`` leaves the model as ``model``."""
    loaded: dict[str, Any] = {}
    exec(request.arguments["code"], loaded)
    model = loaded["model"].eval()
    continued = _class if request.max_new_tokens == 0 else _continuation
    with torch.no_grad():
        tokens = [continued(model, ids, request.max_new_tokens) for ids in request.prompts]
    return Answer(tokens, _dtype(model), transformers.__version__)


def _dtype(model: Any) -> str:
    """What it computes in. On CPUs with AVX512-BF16 bitsandbytes rounds to bfloat16, whatever the model's dtype is."""
    in_16_bits = (getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    dtype = torch.bfloat16 if model.device.type == "cpu" and any(in_16_bits) else model.dtype
    return str(dtype).removeprefix("torch.")


def _continuation(model: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy, whatever else the generation settings say: a penalty on repetitions, say."""
    ends = model.generation_config.eos_token_id
    plain = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=0)
    for one in (model, getattr(model, "base_model", model)):  # PEFT gives its own settings to the model in it
        one.generation_config = plain
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    found: list[int] = output[0, len(ids) :].tolist()
    return found


def _class(model: Any, ids: list[int], _: int) -> list[int]:
    return [int(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].argmax())]
