"""Everything that can be wrong with a run, found before anything but caches is written, and said in one message.

Shared by train (on all ranks), submit (on a login node) and doctor (on each node).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qvtune.config.deepspeed import PERSISTENCE, LayerSizes, fill_from_model
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.data.batch import padding_token
from qvtune.data.mixture import RowOrder, Rows
from qvtune.distributed import process_group
from qvtune.errors import UserError, naming_setting
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import attention_dropout, choose_attention, choose_dtype
from qvtune.model.layers import layer_sizes
from qvtune.model.loader import open_base
from qvtune.model.shard import resident_bytes
from qvtune.model.skeleton import require_forward
from qvtune.model.source import cached_model_folder, model_folder
from qvtune.model.whole import cache_bytes, free_on_device, require_room
from qvtune.optim.groups import parameter_groups
from qvtune.report.trackers.tracker import require_trackers
from qvtune.tasks import get_task
from qvtune.tasks.task import Task
from qvtune.train.checks import Checks
from qvtune.train.data import (
    BASE,
    TRAIN,
    FindModel,
    Poll,
    check_rows,
    data_sets,
    data_statistics,
    describe,
    eval_sets,
    find_base,
    load_tokenizer,
    max_steps,
    row_order,
    sample_rows,
    token_rows,
    with_labels,
)
from qvtune.train.prompts import GENERATE, Prompt, load_prompts, prompt_texts
from qvtune.train.run_folder import find_resume, require_same_rows
from qvtune.train.stage import Ranks, resolve_or_choose
from qvtune.train.step_memory import StepMemory, step_memory

_FIRST_ROWS = 1000  # read of each data set where rows are not tokenized


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and has not started.

    ``config`` is the run's, with the labels of the training rows where the task needs them. ``deepspeed_config`` is
    complete; ``resume`` is the checkpoint as found now (who takes the run folder looks again); ``data_statistics`` is
    the content of ``run_dir/data.json``; ``prompts`` are those of ``train.generate``, which may be none.
    """

    config: RunConfig
    task: Task
    folder: Path
    attention: str
    dtype: torch.dtype
    deepspeed_config: dict[str, Any]
    resume: Path | None
    rows: Rows
    order: RowOrder
    eval_sets: dict[str, Rows]
    data_statistics: dict[str, Any]
    tokenizer: Any
    prompts: list[Prompt]
    pad_token_id: int
    max_steps: int


def preflight(
    config: RunConfig,
    world_size: int,
    *,
    on_gpus: bool | None = None,
    ranks_per_node: int | None = None,
    poll: Poll = lambda: None,
    poll_alone: Poll = lambda: None,
) -> Plan:
    """Check a run on ``world_size`` ranks and tokenize its data; collective where there is a process group.

    Args:
        on_gpus: None where the run computes on the devices of this machine, which are looked at. Else it will compute
            elsewhere, on GPUs (taken to have bfloat16) or on CPUs.
        ranks_per_node: where it computes elsewhere.
        poll: raises StopRequested on all ranks; called by all of them alike.
        poll_alone: the same for work of one rank.

    Raises:
        UserError: on all ranks, with every problem of settings, model and data together.
    """
    checks = Checks()
    config = with_labels(config, checks)
    found = _inspect(config, Ranks(world_size, on_gpus, ranks_per_node), checks)
    rows = token_rows(config, found.tokenizer, checks, poll, poll_alone)
    statistics = checks.run_on_main(partial(_statistics, config, rows, found)) if TRAIN in rows else None
    sharded = found.deepspeed_config is not None and found.deepspeed_config["zero_optimization"]["stage"] == 3
    prompts, room = _prompts(config, found, world_size if sharded and on_gpus is None else None, checks)
    checks.raise_all()
    assert found.folder is not None and found.deepspeed_config is not None and found.model is not None
    assert statistics is not None
    _log(found, statistics, room)
    return Plan(
        config=config,
        task=get_task(config.task, config.classification),
        folder=found.folder,
        attention=found.attention,
        dtype=found.dtype,
        deepspeed_config=found.deepspeed_config,
        resume=found.resume,
        rows=rows[TRAIN],
        order=row_order(config, rows[TRAIN]),
        eval_sets=eval_sets(config, rows),
        data_statistics=statistics,
        tokenizer=found.tokenizer,
        prompts=prompts,
        pad_token_id=padding_token(found.tokenizer),
        max_steps=max_steps(config, len(rows[TRAIN])),
    )


def find_problems(config: RunConfig, world_size: int, *, on_gpus: bool | None = None) -> list[str]:
    """What ``preflight`` would refuse, found in seconds: only the first rows are read, and nothing is tokenized.

    A model that is not on this machine yet is neither downloaded nor converted, and not checked.
    """
    checks = Checks()
    _inspect(config, Ranks(world_size, on_gpus), checks, cached_model_folder)
    for setting, sources in data_sets(config).items():
        for source in sources:
            checks.run(partial(check_rows, setting, source, config, max_rows=_FIRST_ROWS))
    if (settings := config.train.generate) is not None:
        checks.run(lambda: prompt_texts(settings))
    return checks.found


def _prompts(
    config: RunConfig, found: "_Inspected", num_ranks: int | None, checks: Checks
) -> tuple[list[Prompt], str | None]:
    """The prompts of ``train.generate``, and what answering them takes of the memory; collective.

    ``num_ranks`` shard the base on this machine; None where the base is not sharded, or somewhere else.
    """
    settings, model = config.train.generate, found.model
    if settings is None or found.tokenizer is None:
        return [], None
    prompts = checks.run_on_main(partial(load_prompts, config, found.tokenizer)) or []
    if not prompts or model is None or num_ranks is None:
        return prompts, None
    tokens = settings.batch_size * (max(len(one.ids) for one in prompts) + settings.max_new_tokens)
    cache = cache_bytes(model.config, tokens, found.dtype)
    free = min(process_group.all_gather_object(free_on_device())) - model.num_bytes // num_ranks
    room = checks.run_on_main(lambda: naming_setting(GENERATE)(require_room)(model.num_bytes, cache, free))
    return prompts, room and f"{GENERATE}: {len(prompts)} prompts; {room}"


def _statistics(config: RunConfig, rows: Mapping[str, Rows], inspected: "_Inspected") -> dict[str, Any]:
    """Of all rows, which must be those of the checkpoint's run, with the first training rows as text. On rank 0."""
    found = data_statistics(config, rows)
    if inspected.resume is not None:
        require_same_rows(Path(config.run_dir), found)
    if inspected.tokenizer is not None:
        found[TRAIN]["samples"] = sample_rows(config, rows[TRAIN], inspected.tokenizer)
    return found


@dataclass(frozen=True)
class _Model:
    """transformers' configuration; bytes of the whole base; its layers, and the elements of all parameters, adapters
    included; what a step needs, None without adapters."""

    config: Any
    num_bytes: int
    layers: LayerSizes
    numels: tuple[int, ...]
    memory: StepMemory | None


@dataclass(frozen=True)
class _Inspected:
    """What is known before any row is read; None where a problem has been found."""

    dtype: torch.dtype
    attention: str
    reasons: str
    deepspeed_config: dict[str, Any] | None
    resume: Path | None
    folder: Path | None
    model: _Model | None
    tokenizer: Any


def _inspect(config: RunConfig, ranks: Ranks, checks: Checks, find_model: FindModel = model_folder) -> _Inspected:
    on_gpus = ranks.on_gpus
    dtype, dtype_reason = choose_dtype(config.model.dtype, on_gpus)
    checks.run(lambda: require_trackers(config.report))
    resume = checks.run_on_main(lambda: find_resume(config))
    folder = find_base(config, checks, find_model)
    model = tokenizer = None
    if folder is not None:
        model = _check_model(folder, config, dtype, checks)
        tokenizer = checks.run(partial(load_tokenizer, folder, config.model))
    memory = None if model is None else model.memory
    deepspeed_config, deepspeed_reason = resolve_or_choose(config, dtype, memory, ranks, checks)
    if deepspeed_config is not None and model is not None:
        deepspeed_config = fill_from_model(deepspeed_config, model.layers)
    # Kernels cannot be looked for on another machine; no check depends on which they are.
    dropout = 0.0 if model is None else attention_dropout(model.config)
    chosen = checks.run(lambda: choose_attention(config.model.attention, dtype, dropout)) if on_gpus is None else None
    attention, attention_reason = chosen or ("sdpa", "for checks only")
    return _Inspected(
        dtype=dtype,
        attention=attention,
        reasons=f"compute in {dtype} ({dtype_reason}); attention {attention} ({attention_reason}){deepspeed_reason}",
        deepspeed_config=deepspeed_config,
        resume=resume,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
    )


def _check_model(folder: Path, config: RunConfig, dtype: torch.dtype, checks: Checks) -> _Model | None:
    """Weights against architecture, model against task, groups against projections, on a skeleton without memory."""
    named = naming_setting(BASE)
    task, seed = get_task(config.task, config.classification), config.train.seed
    base = checks.run(lambda: named(open_base)(folder, config.model, dtype, "sdpa", config.adapter, task.head(seed)))
    if base is None:
        return None
    checks.run(lambda: named(require_forward)(base.model.config, config.model, task.head(seed)))
    checks.run(partial(_check_task, task, base.model.config, config.data.max_length))
    num_bytes = sum(resident_bytes(parameter) for parameter in base.skeleton.parameters())
    adapted = checks.run(
        lambda: add_adapters(base.model, config.adapter, str(folder), seed, new_modules=base.new_modules)
    )
    if adapted is not None:
        checks.run(lambda: parameter_groups(trainable(adapted), config.optimizer))
    model = base.model if adapted is None else adapted
    numels = tuple(parameter.numel() for parameter in model.parameters())
    memory = None if adapted is None else step_memory(config, adapted, base.model.config, dtype)
    return _Model(base.model.config, num_bytes, layer_sizes(model), numels, memory)


def _check_task(task: Task, model_config: Any, max_length: int) -> None:
    if problems := task.model_problems(model_config, max_length):
        raise UserError(problems)


def _persistent_line(found: _Inspected) -> str | None:
    """What stays whole on every rank, however many there are."""
    assert found.deepspeed_config is not None and found.model is not None
    threshold = found.deepspeed_config["zero_optimization"].get(PERSISTENCE, 0)
    small = [numel for numel in found.model.numels if numel <= threshold]
    if not small:
        return None
    size = sum(small) * found.dtype.itemsize / 1e6
    return f"{len(small)} parameters of at most {threshold:,} elements stay whole on every rank: {size:.1f} MB"


def _log(found: _Inspected, statistics: Mapping[str, Any], room: str | None) -> None:
    if process_group.is_main():
        console().print(found.reasons)
        if line := _persistent_line(found):
            console().print(line)
        for setting, one in statistics.items():
            for line in describe(one):
                console().print(f"{setting}: {line}", markup=False)
        if room is not None:
            console().print(room)
