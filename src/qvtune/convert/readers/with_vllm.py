"""vLLM's offline engine, with the options of `vllm serve` on the model card."""

import vllm
from vllm import LLM, SamplingParams

from qvtune.convert.readers.process import Answer, Request


def read(request: Request) -> Answer:
    """``arguments``: ``options`` of the engine, and the folder of an ``adapter`` or None."""
    adapter = request.arguments["adapter"]
    options = {"lora_request": None}
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        options["lora_request"] = LoRARequest("adapter", 1, adapter)
    outputs = LLM(**request.arguments["options"]).generate(
        [{"prompt_token_ids": ids} for ids in request.prompts],
        SamplingParams(temperature=0, max_tokens=request.max_new_tokens),
        **options,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Answer(tokens, request.arguments["options"]["dtype"], vllm.__version__)
