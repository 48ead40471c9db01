"""The model that is being trained, whole on one rank for a while: for generation, whose length differs among ranks.

ZeRO-3 gathers the parameters of a module when it runs, on all ranks together. A rank that generates would have to run
as many tokens as the others. Instead everything is gathered once, into a second set of the same modules that DeepSpeed
does not know. Matrices in NF4 stay packed and are dequantized one at a time, as in training: 5.7 GB for 8B weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.distributed import process_group
from qvtune.errors import UserError
from qvtune.model.adapters import transformers_model
from qvtune.model.shard import gathered, release_gathered
from qvtune.system import free_memory, return_freed_memory


class WholeModel:
    """The modules of a model with its adapters, without memory but inside of ``filled``.

    ``empty``: what ``add_adapters`` makes of a skeleton. ``folder``: that of the base, whose settings of generation
    apply.
    """

    def __init__(self, empty: nn.Module, folder: Path) -> None:
        from transformers import GenerationConfig

        self._empty = empty.eval()  # without dropout; and never with activation checkpointing
        if (folder / "generation_config.json").is_file():  # as transformers does when it loads a model with weights
            transformers_model(empty).generation_config = GenerationConfig.from_pretrained(folder)

    @contextmanager
    def filled(self, engine: Any, between_modules: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """The transformers model with the values that ``engine`` trains; collective at its start, not inside.

        With ZeRO-2 and on a single rank these are the engine's own tensors, with ZeRO-3 they are gathered; nothing of
        them is left afterwards. ``between_modules`` is called equally often on all ranks.
        """
        release_gathered(engine)
        try:
            _fill(self._empty, engine.module.model, between_modules)
            yield transformers_model(self._empty)
        finally:
            self._empty.to("meta")
            return_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _fill(empty: nn.Module, trained: nn.Module, between_modules: Callable[[], None]) -> None:
    """Give the modules of ``empty`` the values of those with the same paths in ``trained``; collective."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are gathered once
    for path, module in empty.named_modules():
        source = trained.get_submodule(path)
        own = dict(source.named_parameters(recurse=False))
        if new := [parameter for parameter in own.values() if parameter not in filled]:
            between_modules()
            with gathered(new):  # what it has gathered stays in memory as long as a tensor here refers to it
                filled |= {parameter: nn.Parameter(parameter.data, requires_grad=False) for parameter in new}
        for name, parameter in own.items():
            setattr(module, name, filled[parameter])
        for name, buffer in source.named_buffers(recurse=False):
            setattr(module, name, buffer)


def free_on_device() -> int:
    """Bytes that this rank may still allocate: of its GPU, or its part of the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_memory() // process_group.ranks_of_host()


def require_room(base_bytes: int, cache_bytes: int, free_bytes: int) -> str:
    """The memory of a generation in one line, for the log. Raises UserError where it is more than is free."""
    line = (
        f"each rank gathers the base ({_gb(base_bytes)}) and keeps keys and values ({_gb(cache_bytes)}); "
        f"{_gb(free_bytes)} are free for a rank"
    )
    if base_bytes + cache_bytes > free_bytes:
        raise UserError(
            f"{line}: generate after training, with the merged model, or quantize the base (model.quantization: nf4), "
            "or lower batch_size and max_new_tokens"
        )
    return line


def cache_bytes(model_config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of ``num_tokens`` in all layers."""
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    values = model_config.num_hidden_layers * model_config.num_key_value_heads * head_dim
    return 2 * int(values) * num_tokens * dtype.itemsize


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
