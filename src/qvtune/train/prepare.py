"""From a checked configuration to an engine that is ready for its next step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.checkpoint import engine as checkpoint_engine
from qvtune.checkpoint import state as checkpoint_state
from qvtune.checkpoint.owner import Owner
from qvtune.checkpoint.state import TrainerState
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.distributed import heartbeat, process_group
from qvtune.distributed.stop import StopRequest
from qvtune.errors import naming_setting
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import prepare_attention
from qvtune.model.fingerprint import Fingerprint, require_unchanged
from qvtune.model.kept import KeptBase
from qvtune.model.layers import hook_layers
from qvtune.model.loader import LoadReport, fill, open_base
from qvtune.model.shard import Whole, ZeroPartition
from qvtune.model.varlen import VARLEN
from qvtune.model.whole import WholeModel
from qvtune.optim.groups import assert_multipliers, groups_table, parameter_groups
from qvtune.storage.paths import cache_dir
from qvtune.train.preflight import Plan, preflight
from qvtune.train.run_folder import open_run_folder, trajectory_settings


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step."""

    engine: Any
    plan: Plan
    run_dir: Path
    owner: Owner | None  # on rank 0, which alone writes there
    resume: Path | None
    damaged: list[str]  # on rank 0: newer checkpoints that were damaged, as they are called now
    state: TrainerState
    load: LoadReport
    fingerprint: Fingerprint
    whole: WholeModel | None  # of a run that generates


def prepare(config: RunConfig, stop: StopRequest, kept: KeptBase | None = None) -> Run:
    """Load the base, add adapters, start DeepSpeed, resume from a checkpoint if there is one; collective.

    ``kept``: as of ``fill``. Raises UserError and StopRequested, on all ranks, as long as the run folder is untouched.
    """
    with heartbeat.unlimited("checks, downloads and tokenization"):
        planned = preflight(config, process_group.world_size(), poll=stop.poll, poll_alone=stop.poll_alone)
    heartbeat.beat("loading of the base")
    model, load, content = _load_model(config, planned, stop, kept)
    stop.poll()
    config = planned.config
    whole = _whole_model(config, planned) if planned.prompts else None
    heartbeat.beat("opening of the run folder")
    resume, owner, damaged = open_run_folder(config, planned.deepspeed_config, planned.data_statistics, planned.resume)
    if resume is not None:
        checkpoint_engine.load_trained(resume, model)
        state = checkpoint_state.load_trainer_state(resume)
        if process_group.is_main():
            console().print(_resume_line(resume, planned, state))
        state.max_steps = planned.max_steps
    else:
        state = TrainerState(max_steps=planned.max_steps, trajectory=trajectory_settings(config))
    with heartbeat.unlimited("start of DeepSpeed"):  # it may compile
        engine = _start_engine(model, config, planned, resume, state)
    return Run(engine, planned, Path(config.run_dir), owner, resume, damaged, state, load, content, whole)


def _resume_line(resume: Path, planned: Plan, state: TrainerState) -> str:
    line = f"resuming from {resume}, step {state.step} of {planned.max_steps}"
    if planned.max_steps != state.max_steps:
        line += f"; it was {state.max_steps}, so the remaining steps follow another learning-rate schedule"
    return line


def _load_model(
    config: RunConfig, planned: Plan, stop: StopRequest, kept: KeptBase | None
) -> tuple[nn.Module, LoadReport, Fingerprint]:
    head = planned.task.head(config.train.seed, planned.rows)
    prepare_attention(planned.attention, deterministic=config.model.deterministic_attention)
    with naming_setting("model.name_or_path"):
        base = open_base(planned.folder, config.model, planned.dtype, planned.attention, config.adapter, head)
    if process_group.is_main() and base.head_note and planned.resume is None:
        console().print(base.head_note, markup=False)
    if planned.deepspeed_config["zero_optimization"]["stage"] == 3:
        placement: ZeroPartition | Whole = ZeroPartition(planned.deepspeed_config, planned.dtype)
    else:
        placement = Whole(process_group.device())
    load, content = fill(base, placement, planned.dtype, stop.poll, kept)
    with process_group.raise_on_all_ranks():
        if process_group.is_main():
            if planned.resume is not None:
                checkpoint_state.require_base(planned.resume, content, same_heads=head is None)
            require_unchanged(base.weights, content, cache_dir() / "bases")
    model = add_adapters(
        base.model,
        config.adapter,
        str(planned.folder),
        config.train.seed,
        planned.task.peft_task_type,
        base.new_modules,
    )
    if config.train.activation_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model, load, content


def _whole_model(config: RunConfig, planned: Plan) -> WholeModel:
    # Generation has a cache, which has no documents' borders.
    attention = "sdpa" if planned.attention == VARLEN else planned.attention
    base = open_base(planned.folder, config.model, planned.dtype, attention, config.adapter)
    return WholeModel(add_adapters(base.model, config.adapter, str(planned.folder), config.train.seed), planned.folder)


def _start_engine(model: nn.Module, config: RunConfig, planned: Plan, resume: Path | None, state: TrainerState) -> Any:
    """The DeepSpeed engine around the objective, with the checkpoint's moments if there is one; its groups proved."""
    import deepspeed

    section = config.optimizer
    groups = parameter_groups(trainable(model), section)
    optimizer = torch.optim.AdamW(
        # DeepSpeed rewrites the dictionaries it gets; ours stay as they were built.
        [dict(group) for group in groups],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=planned.task.objective(model),
        optimizer=optimizer,
        config=planned.deepspeed_config,
        dist_init_required=False,
    )
    hook_layers(engine)
    # Under bf16 some stages cast buffers as well; rotary frequencies and NF4 offsets must stay as they were.
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffers[name].to(buffer.device))
    if resume is not None:
        checkpoint_engine.load_optimizer(resume, engine, state.step)
    assert_multipliers(engine.optimizer.param_groups, groups, section.lr)
    if process_group.is_main():
        console().print(groups_table(groups))
    return engine
