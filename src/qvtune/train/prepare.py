"""From a configuration to all that the loop needs; what can be wrong is found before anything is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qvtune.checkpoint import state as checkpoint_state
from qvtune.checkpoint.owner import Owner
from qvtune.checkpoint.state import TrainerState
from qvtune.config.deepspeed import fill_from_model, resolve_deepspeed
from qvtune.config.schema import DataSection, RunConfig
from qvtune.console import console
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.distributed import process_group
from qvtune.distributed.stop import StopRequest
from qvtune.embedded.data import demo_files
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import choose_attention, choose_dtype
from qvtune.model.families import FAMILIES, family_of
from qvtune.model.fingerprint import Fingerprint, require_unchanged
from qvtune.model.loader import LoadReport, fill, open_base
from qvtune.model.shard import Whole, ZeroPartition
from qvtune.model.skeleton import largest_layer_numel
from qvtune.model.source import model_folder
from qvtune.optim.groups import assert_multipliers, parameter_groups
from qvtune.storage.paths import cache_dir
from qvtune.tasks.causal_lm import CausalLMObjective
from qvtune.train.run_folder import find_resume, open_run_folder, trajectory_settings

Value = TypeVar("Value")


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and has not begun."""

    folder: Path
    attention: str
    dtype: torch.dtype
    deepspeed_config: dict[str, Any]
    resume: Path | None  # as found; who takes the run folder looks again
    rows: TokenRows
    eval_rows: TokenRows | None
    pad_token_id: int
    max_steps: int


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step."""

    engine: Any
    plan: Plan
    run_dir: Path
    owner: Owner | None  # on rank 0, which alone writes there
    resume: Path | None
    state: TrainerState
    load: LoadReport
    fingerprint: Fingerprint


def plan(config: RunConfig, stop: StopRequest) -> Plan:
    """Check everything; collective. Raises UserError on all ranks, with nothing written but caches."""
    with process_group.raise_on_all_ranks():
        dtype, dtype_reason = choose_dtype(config.model.dtype)
        attention, attention_reason = choose_attention(config.model.attention, dtype)
        deepspeed_config = resolve_deepspeed(config, process_group.world_size(), str(dtype).removeprefix("torch."))
        resume = find_resume(config)
    folder = process_group.once_per_host(lambda: model_folder(config.model.name_or_path, cache_dir()))
    with process_group.raise_on_all_ranks():
        layer_numel = _check_model(folder, config, dtype)
        tokenizer = _tokenizer(folder, config)
    deepspeed_config = fill_from_model(deepspeed_config, layer_numel)
    rows = _rows(config.data.train, "data.train", config.data, tokenizer, stop)
    eval_rows = None if config.data.eval is None else _rows(config.data.eval, "data.eval", config.data, tokenizer, stop)
    if process_group.is_main():
        out = console()
        out.print(f"compute in {dtype} ({dtype_reason}); attention {attention} ({attention_reason})")
        out.print(f"data.train: {_describe(rows)}")
        if eval_rows is not None:
            out.print(f"data.eval: {_describe(eval_rows)}")
    max_steps = config.train.max_steps
    if max_steps is None:
        assert config.train.epochs is not None
        max_steps = max(1, math.ceil(config.train.epochs * len(rows) / config.train.global_batch_size))
    # Padding has no loss and nothing attends to it: any token will do.
    pad_token_id = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return Plan(folder, attention, dtype, deepspeed_config, resume, rows, eval_rows, pad_token_id, max_steps)


def check_recipe(config: RunConfig, world_size: int, on_gpus: bool) -> None:
    """What ``plan`` checks, but for the devices of the run, in one process on a machine that need not have them.

    Base and rows land in the caches, where the run on ``world_size`` ranks finds them. Raises UserError with the
    problems of all parts that can be looked at on their own.
    """
    dtype = dtype_there(config, on_gpus)
    problems: list[str] = []

    def attempt(check: Callable[[], Value]) -> Value | None:
        try:
            return check()
        except UserError as error:
            problems.extend(error.problems)
            return None

    attempt(lambda: resolve_deepspeed(config, world_size, str(dtype).removeprefix("torch.")))
    attempt(lambda: find_resume(config))
    folder = attempt(lambda: model_folder(config.model.name_or_path, cache_dir()))
    if folder is not None:
        attempt(lambda: _check_model(folder, config, dtype))
        tokenizer = attempt(lambda: _tokenizer(folder, config))
        for setting, path in _files(config):
            if tokenizer is not None and path is not None:
                attempt(partial(_build_rows, path, setting, config.data, tokenizer))
    if problems:
        raise UserError(problems)


def dtype_there(config: RunConfig, on_gpus: bool) -> torch.dtype:
    """What ``choose_dtype`` will say on the machines of the run: their GPUs are taken to have bfloat16."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if on_gpus else torch.float32
    return choose_dtype(config.model.dtype)[0]


def _check_model(folder: Path, config: RunConfig, dtype: torch.dtype) -> int:
    """Weights against architecture, and groups against projections, on a skeleton without memory.

    Returns the elements that a decoder layer is stored in.
    """
    base = open_base(folder, config.model, dtype, "sdpa", config.adapter)
    if family_of(base.skeleton).is_encoder:
        decoders = [name for name, family in FAMILIES.items() if not family.is_encoder]
        raise UserError(
            f"task: {config.task} predicts the next token, and {folder} is an encoder, whose tokens see those after "
            f"them; give a decoder ({', '.join(decoders)}) in model.name_or_path"
        )
    layer_numel = largest_layer_numel(base.skeleton)
    adapted = add_adapters(base.skeleton, config.adapter, str(folder), config.train.seed)
    parameter_groups(trainable(adapted), config.optimizer)
    return layer_numel


def _tokenizer(folder: Path, config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer that can be loaded ({error}) (model.name_or_path)") from error


def _files(config: RunConfig) -> tuple[tuple[str, str | None], ...]:
    return ("data.train", config.data.train), ("data.eval", config.data.eval)


def _rows(path: str, setting: str, data: DataSection, tokenizer: Any, stop: StopRequest) -> TokenRows:
    stop.poll()
    return process_group.once_per_host(lambda: _build_rows(path, setting, data, tokenizer, stop.poll_alone))


def _build_rows(
    path: str, setting: str, data: DataSection, tokenizer: Any, poll: Callable[[], None] = lambda: None
) -> TokenRows:
    files = demo_files(cache_dir()) if path == "demo" else (Path(path), Path(path))
    file = files[0] if setting == "data.train" else files[1]
    return build_token_rows(file, setting, data, tokenizer, cache_dir() / "tokens", poll)


def _describe(rows: TokenRows) -> str:
    text = f"{rows.num_documents} documents in {len(rows)} rows, {int(rows.num_tokens.sum())} tokens"
    for count, what in (
        (rows.num_skipped, "bad rows left out (data.on_bad_row)"),
        (rows.num_truncated, "documents cut off at data.max_length"),
        (rows.num_dropped, "documents left out, as data.max_length leaves them nothing to learn"),
    ):
        text += f"; {count} {what}" if count else ""
    return text


def prepare(config: RunConfig, stop: StopRequest) -> Run:
    """Load the base, add adapters, start DeepSpeed, go on from a checkpoint if there is one; collective.

    Raises UserError and StopRequested, on all ranks, as long as the run folder is untouched.
    """
    planned = plan(config, stop)
    model, load, content = _load_model(config, planned, stop)
    stop.poll()
    resume, owner = open_run_folder(config, planned.deepspeed_config)
    if resume is not None:
        checkpoint_state.load_trained(resume, model)
        state = checkpoint_state.load_trainer_state(resume)
        if process_group.is_main():
            console().print(_resume_line(resume, planned, state))
        state.max_steps = planned.max_steps
    else:
        state = TrainerState(max_steps=planned.max_steps, trajectory=trajectory_settings(config))
    engine = _start_engine(model, config, planned, resume, state)
    return Run(engine, planned, Path(config.run_dir), owner, resume, state, load, content)


def _resume_line(resume: Path, planned: Plan, state: TrainerState) -> str:
    line = f"going on from {resume}, step {state.step} of {planned.max_steps}"
    if planned.max_steps != state.max_steps:
        line += f"; it was {state.max_steps}, so the learning rates to come follow another schedule"
    return line


def _load_model(config: RunConfig, planned: Plan, stop: StopRequest) -> tuple[nn.Module, LoadReport, Fingerprint]:
    base = open_base(planned.folder, config.model, planned.dtype, planned.attention, config.adapter)
    if planned.deepspeed_config["zero_optimization"]["stage"] == 3:
        placement: ZeroPartition | Whole = ZeroPartition(planned.deepspeed_config, planned.dtype)
        gather = process_group.all_gather_tensor
    else:
        placement, gather = Whole(process_group.device()), lambda own: [own]
    load, content = fill(base, placement, planned.dtype, gather, stop.poll)
    if planned.resume is not None:
        checkpoint_state.require_base(planned.resume, content)
    with process_group.raise_on_all_ranks():
        if process_group.is_main():
            require_unchanged(base.weights, content, cache_dir() / "bases")
    model = add_adapters(base.skeleton, config.adapter, str(planned.folder), config.train.seed)
    if config.train.activation_checkpointing:
        base.skeleton.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model, load, content


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
        weight_decay=section.weight_decay,
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=CausalLMObjective(model), optimizer=optimizer, config=planned.deepspeed_config, dist_init_required=False
    )
    # Under bf16 some stages cast buffers as well; rotary frequencies and NF4 offsets must stay as they were.
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffers[name].to(buffer.device))
    if resume is not None:
        checkpoint_state.load_optimizer(resume, engine, state.step)
    assert_multipliers(engine.optimizer.param_groups, groups, section.lr)
    if process_group.is_main():
        for group in groups:
            count = sum(
                parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
                for parameter in group["params"]
            )
            console().print(
                f"group {group['name']}: {count:,} parameters, lr {group['initial_lr']:g} (x{group['multiplier']:g})"
            )
    return engine
