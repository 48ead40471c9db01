"""Memory and disk that a run needs, from the skeleton of its model. In bytes, activations excluded."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.config.deepspeed import AUTO, find_json
from qvtune.config.schema import RunConfig
from qvtune.errors import naming_setting
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import open_base
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Shard
from qvtune.storage.safetensors import TensorFiles
from qvtune.tasks import get_task
from qvtune.train.stage import SHARDED

_PROCESS = 700 << 20  # resident memory of a rank after imports and start of gloo, before it loads anything (measured)
_FP32_STATE = 12  # per trained element: fp32 master and AdamW's two moments
_CHECKPOINT_JSON = 1 << 20


@dataclass(frozen=True)
class Needs:
    """Of one rank, but for ``checkpoint``.

    Attributes:
        base: frozen parameters resident after loading: ``base_bytes`` of the event ``base_loaded``.
        generation: the whole base, gathered while ``train.generate`` answers; 0 where it is not sharded.
        training: trained parameters that are not part of the base, gradients, masters and moments.
        process: the Python process, and the largest weight while it is used in the compute dtype.
        checkpoint: one checkpoint on disk.
        base_on_host, training_on_host: whether DeepSpeed offloads these from a GPU to host memory.
    """

    base: int
    training: int
    process: int
    checkpoint: int
    generation: int = 0
    base_on_host: bool = False
    training_on_host: bool = False

    def split(self, on_gpus: bool) -> tuple[int, int]:
        """Bytes of host memory and of GPU memory per rank."""
        if not on_gpus:
            return self.process + self.base + self.training + self.generation, 0
        host = self.base * self.base_on_host + self.training * self.training_on_host
        return self.process + host, self.base + self.training + self.generation - host


def needs_of(config: RunConfig, folder: Path, world_size: int, dtype: torch.dtype) -> tuple[Needs, TensorFiles]:
    """Needs of a run on ``world_size`` ranks that compute in ``dtype``, and the headers of its base.

    Sizes are exact but for ``process``; ZeRO-3 pads each parameter to a multiple of the ranks.

    Raises UserError if the base cannot be trained, or does not have the adapted projections.
    """
    zero = _zero_section(config)
    with naming_setting("model.name_or_path"):
        head = get_task(config.task, config.classification).head(config.train.seed)
        base = open_base(folder, config.model, dtype, "sdpa", config.adapter, head)
    frozen = list(base.skeleton.parameters())
    largest = max(_num_weights(base.skeleton)) * dtype.itemsize
    adapted = add_adapters(base.model, config.adapter, str(folder), config.train.seed, new_modules=base.new_modules)
    trained = [parameter for _, parameter in trainable(adapted)]
    added = [parameter for parameter in trained if not any(parameter is one for one in frozen)]
    every_rank = Shard(0, world_size)
    is_sharded = zero.get("stage", 3) == 3
    parameters = every_rank if is_sharded else Shard()
    needs = Needs(
        base=_numel(frozen, parameters) * dtype.itemsize,
        training=_numel(added, parameters) * dtype.itemsize
        + _numel(trained, every_rank) * (dtype.itemsize + _FP32_STATE),
        process=_PROCESS + largest,
        checkpoint=_numel(trained, Shard()) * (dtype.itemsize + _FP32_STATE) + _CHECKPOINT_JSON,
        generation=_numel(frozen, Shard()) * dtype.itemsize if is_sharded and config.train.generate else 0,
        base_on_host=_is_offloaded(zero, "offload_param"),
        training_on_host=_is_offloaded(zero, "offload_optimizer"),
    )
    return needs, base.weights


def _numel(parameters: Iterable[nn.Parameter], shard: Shard) -> int:
    """Elements that a rank stores."""
    return sum(shard.numel(parameter.numel()) for parameter in parameters)


def _num_weights(skeleton: nn.Module) -> list[int]:
    """Elements of each weight as it is used: of a matrix in NF4 those of the dequantized one."""
    matrices = [module.layout.num_weights for module in skeleton.modules() if isinstance(module, NF4Linear)]
    return matrices + [parameter.numel() for parameter in skeleton.parameters()]


def _zero_section(config: RunConfig) -> dict[str, Any]:
    # `auto` takes the base whole where that fits: what it needs at least is a shard.
    name = SHARDED if config.deepspeed == AUTO else config.deepspeed
    content = json.loads(find_json(name).read_text(encoding="utf-8"))
    section: dict[str, Any] = content.get("zero_optimization", {})
    return section


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return bool(zero.get(key, {}).get("device", "none") != "none")
