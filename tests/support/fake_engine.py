"""A small model and its DeepSpeed engine, in one process that is rank 0 of any number (``fake_ranks``)."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from qvtune.config.deepspeed import fill_from_model, resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.data.batch import Batch
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.layers import hook_layers, layer_sizes
from qvtune.model.shard import Placement, Whole, ZeroPartition
from qvtune.model.skeleton import build_skeleton
from qvtune.optim.groups import parameter_groups
from qvtune.tasks import get_task


def run_of(num_ranks: int, deepspeed: str = "zero3.json", **train: Any) -> RunConfig:
    """A run with one row in a micro-batch, and one micro-batch in a step."""
    section = {"max_steps": 1, "global_batch_size": num_ranks, **train}
    return RunConfig.model_validate({"run_dir": "unused", "deepspeed": deepspeed, "train": section})


def small_model(run: RunConfig, num_layers: int, dtype: torch.dtype, placement: Placement | None) -> nn.Module:
    """A LLaMA with adapters; its frozen parameters are zeros, or without memory where there is no ``placement``."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
    )
    skeleton: Any = build_skeleton(config, run.model, dtype, "sdpa")
    for module in skeleton.modules() if placement is not None else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            piece = torch.zeros(placement.shard.numel(parameter.numel()), dtype=dtype)
            setattr(module, name, placement.parameter(tuple(parameter.shape), piece))
    model = add_adapters(skeleton, run.adapter, config.name_or_path, run.train.seed)
    if run.train.activation_checkpointing:
        skeleton.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def whole_objective(run: RunConfig, num_layers: int, dtype: torch.dtype) -> nn.Module:
    """Model and loss without DeepSpeed."""
    return get_task(run.task).objective(small_model(run, num_layers, dtype, Whole(torch.device("cpu"))))


def start_engine(run: RunConfig, num_layers: int, num_ranks: int, dtype: torch.dtype) -> Any:
    """The engine as ``qvtune.train.prepare`` starts it; inside of ``fake_ranks(num_ranks)``."""
    import deepspeed

    resolved = resolve_deepspeed(run, num_ranks, str(dtype).removeprefix("torch."))
    config = fill_from_model(resolved, layer_sizes(small_model(run, num_layers, dtype, None)))
    is_sharded = config["zero_optimization"]["stage"] == 3
    placement = ZeroPartition(config, dtype) if is_sharded else Whole(torch.device("cpu"))
    model = small_model(run, num_layers, dtype, placement)
    optimizer = torch.optim.AdamW(parameter_groups(trainable(model), run.optimizer))
    engine, *_ = deepspeed.initialize(
        model=get_task(run.task).objective(model), optimizer=optimizer, config=config, dist_init_required=False
    )
    hook_layers(engine)
    return engine


def small_batch(length: int = 32) -> Batch:
    """One row of one document; every token has a label."""
    ids = torch.zeros(1, length, dtype=torch.long)
    borders = torch.tensor([0, length], dtype=torch.int32)
    positions = torch.arange(length)
    return Batch(ids, torch.ones_like(ids), positions[None], borders, length, label_positions=positions)
