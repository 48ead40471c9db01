"""Everything that can be wrong with a run, found before anything but caches is written, and said in one message.

Shared by train (on all ranks), submit (on a login node) and doctor (on each node).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qvtune.config.deepspeed import fill_from_model, resolve_deepspeed
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.console import console
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.rows import read_rows
from qvtune.distributed import process_group
from qvtune.embedded.data import demo_files
from qvtune.errors import Problems, UserError, naming_setting
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import choose_attention, choose_dtype
from qvtune.model.loader import open_base
from qvtune.model.skeleton import largest_layer_numel, require_forward
from qvtune.model.source import cached_model_folder, model_folder
from qvtune.optim.groups import parameter_groups
from qvtune.storage.paths import cache_dir
from qvtune.tasks import get_task
from qvtune.tasks.task import Task
from qvtune.train.run_folder import find_resume

Value = TypeVar("Value")
Poll = Callable[[], None]
FindModel = Callable[[str, Path, str | None], Path | None]  # as ``model_folder``

_BASE = "model.name_or_path"
_FIRST_ROWS = 1000  # read of each data set where rows are not tokenized


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and has not started.

    ``deepspeed_config`` is complete; ``resume`` is the checkpoint as found now (who takes the run folder looks again).
    """

    task: Task
    folder: Path
    attention: str
    dtype: torch.dtype
    deepspeed_config: dict[str, Any]
    resume: Path | None
    rows: TokenRows
    eval_rows: TokenRows | None
    pad_token_id: int
    max_steps: int


def preflight(
    config: RunConfig,
    world_size: int,
    *,
    on_gpus: bool | None = None,
    poll: Poll = lambda: None,
    poll_alone: Poll = lambda: None,
) -> Plan:
    """Check a run on ``world_size`` ranks and tokenize its data; collective where there is a process group.

    Args:
        on_gpus: None where the run computes on the devices of this machine, which are looked at. Else it will compute
            elsewhere, on GPUs (taken to have bfloat16) or on CPUs.
        poll: raises StopRequested on all ranks; called by all of them alike.
        poll_alone: the same for work of one rank.

    Raises:
        UserError: on all ranks, with every problem of settings, model and data together.
    """
    checks = _Checks()
    found = _inspect(config, world_size, on_gpus, checks)
    rows = _tokenize(config, found.tokenizer, checks, poll, poll_alone)
    checks.raise_all()
    assert found.folder is not None and found.deepspeed_config is not None and found.layer_numel is not None
    train_rows, eval_rows = rows["data.train"], rows.get("data.eval")
    assert train_rows is not None
    _log(found, rows)
    return Plan(
        task=get_task(config.task),
        folder=found.folder,
        attention=found.attention,
        dtype=found.dtype,
        deepspeed_config=fill_from_model(found.deepspeed_config, found.layer_numel),
        resume=found.resume,
        rows=train_rows,
        eval_rows=eval_rows,
        pad_token_id=_pad_token_id(found.tokenizer),
        max_steps=_max_steps(config, len(train_rows)),
    )


def _tokenize(
    config: RunConfig, tokenizer: Any, checks: "_Checks", poll: Poll, poll_alone: Poll
) -> dict[str, TokenRows | None]:
    """Setting -> its rows. Without a tokenizer they are only read, since rows can be bad too."""
    rows: dict[str, TokenRows | None] = {}
    for setting, source in _sources(config):
        poll()
        if tokenizer is None:
            checks.run(partial(_check_rows, setting, source, config))
        else:
            rows[setting] = checks.run_once_per_host(
                partial(_token_rows, setting, source, config, tokenizer, poll_alone)
            )
    return rows


def find_problems(config: RunConfig, world_size: int, *, on_gpus: bool | None = None) -> list[str]:
    """What ``preflight`` would refuse, found in seconds: only the first rows are read, and nothing is tokenized.

    A model that is not on this machine yet is neither downloaded nor converted, and not checked.
    """
    checks = _Checks()
    _inspect(config, world_size, on_gpus, checks, cached_model_folder)
    for setting, source in _sources(config):
        checks.run(partial(_check_rows, setting, source, config, max_rows=_FIRST_ROWS))
    return checks.found


class _Checks(Problems):
    """Checks that all ranks run in the same order; what one rank finds, all of them have found."""

    def run(self, check: Callable[[], Value]) -> Value | None:
        """What ``check`` returns; None, on all ranks, where it raises a UserError on one of them."""
        return self.attempt(partial(_on_all_ranks, check))

    def run_on_main(self, check: Callable[[], Value]) -> Value | None:
        """The same for what rank 0 does alone."""
        return self.attempt(partial(process_group.on_main, check))

    def run_once_per_host(self, build: Callable[[], Value]) -> Value | None:
        """The same for what fills a cache that the ranks of a host share."""
        return self.attempt(partial(process_group.once_per_host, build))


def _on_all_ranks(check: Callable[[], Value]) -> Value:
    with process_group.raise_on_all_ranks():
        return check()


@dataclass(frozen=True)
class _Inspected:
    """What is known before any row is read; None where a problem has been found.

    ``layer_numel``: stored elements of the largest decoder layer.
    """

    dtype: torch.dtype
    attention: str
    reasons: str
    deepspeed_config: dict[str, Any] | None
    resume: Path | None
    folder: Path | None
    layer_numel: int | None
    tokenizer: Any


def _inspect(
    config: RunConfig, world_size: int, on_gpus: bool | None, checks: _Checks, find_model: FindModel = model_folder
) -> _Inspected:
    dtype, dtype_reason = choose_dtype(config.model.dtype, on_gpus)
    # Kernels cannot be looked for on another machine; no check depends on which they are.
    chosen = checks.run(lambda: choose_attention(config.model.attention, dtype)) if on_gpus is None else None
    attention, attention_reason = chosen or ("sdpa", "for checks only")
    name = str(dtype).removeprefix("torch.")
    deepspeed_config = checks.run(lambda: resolve_deepspeed(config, world_size, name))
    checks.run(lambda: _check_nan_check(config, deepspeed_config))
    resume = checks.run_on_main(lambda: find_resume(config))
    find = naming_setting(_BASE)(find_model)
    folder = checks.run_once_per_host(lambda: find(config.model.name_or_path, cache_dir(), config.model.revision))
    layer_numel = tokenizer = None
    if folder is not None:
        layer_numel = _check_model(folder, config, dtype, checks)
        tokenizer = checks.run(partial(_load_tokenizer, folder, config.model))
    return _Inspected(
        dtype=dtype,
        attention=attention,
        reasons=f"compute in {dtype} ({dtype_reason}); attention {attention} ({attention_reason})",
        deepspeed_config=deepspeed_config,
        resume=resume,
        folder=folder,
        layer_numel=layer_numel,
        tokenizer=tokenizer,
    )


def _check_nan_check(config: RunConfig, deepspeed_config: dict[str, Any] | None) -> None:
    """Gathers of a quantized base must not be searched for NaN: its codes are stored in the dtype of the compute."""
    gathered = deepspeed_config is None or deepspeed_config["zero_optimization"]["stage"] == 3
    if config.model.quantization == "nf4" and gathered and (value := process_group.nan_check()) is not None:
        raise UserError(
            f"the environment variable TORCH_NCCL_NAN_CHECK is {value!r}: torch would end the run when it gathers the "
            "base, since some packed 4-bit codes are NaN when read as numbers; unset it in the shell that starts the "
            "run or in slurm/cluster.env (it is allowed with `model.quantization: none` and with zero2.json)"
        )


def _check_model(folder: Path, config: RunConfig, dtype: torch.dtype, checks: _Checks) -> int | None:
    """Weights against architecture, model against task, groups against projections, on a skeleton without memory."""
    named = naming_setting(_BASE)
    base = checks.run(lambda: named(open_base)(folder, config.model, dtype, "sdpa", config.adapter))
    if base is None:
        return None
    checks.run(lambda: named(require_forward)(base.skeleton.config, config.model))
    task = get_task(config.task)
    checks.run(partial(_check_task, task, base.skeleton.config))
    layer_numel = largest_layer_numel(base.skeleton)  # before adapters are in the layers
    adapted = checks.run(lambda: add_adapters(base.skeleton, config.adapter, str(folder), config.train.seed))
    if adapted is not None:
        checks.run(lambda: parameter_groups(trainable(adapted), config.optimizer))
    return layer_numel


def _check_task(task: Task, model_config: Any) -> None:
    if problems := task.model_problems(model_config):
        raise UserError(problems)


def _load_tokenizer(folder: Path, model: ModelSection) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder}: no tokenizer that can be loaded ({error})", setting=_BASE) from error


def _sources(config: RunConfig) -> list[tuple[str, str]]:
    """Setting and value of each data set of the run."""
    sources = {"data.train": config.data.train, "data.eval": config.data.eval}
    return [(setting, source) for setting, source in sources.items() if source is not None]


def _file(setting: str, source: str) -> Path:
    if source != "demo":
        return Path(source)
    train_file, eval_file = demo_files(cache_dir())
    return train_file if setting == "data.train" else eval_file


def _check_rows(setting: str, source: str, config: RunConfig, max_rows: int | None = None) -> None:
    with naming_setting(setting):
        read_rows(_file(setting, source), config.data.format, config.data.on_bad_row, max_rows=max_rows)


def _token_rows(setting: str, source: str, config: RunConfig, tokenizer: Any, poll: Poll) -> TokenRows:
    with naming_setting(setting):
        file, task = _file(setting, source), get_task(config.task)
        return build_token_rows(file, config.data, tokenizer, task, cache_dir() / "tokens", poll)


def _pad_token_id(tokenizer: Any) -> int:
    """Padding has no label, and no other token attends to it: any token will do."""
    found: int = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return found


def _max_steps(config: RunConfig, num_rows: int) -> int:
    """Optimizer steps of the run."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.epochs is not None
    return max(1, math.ceil(train.epochs * num_rows / train.global_batch_size))


def _log(found: _Inspected, rows: Mapping[str, TokenRows | None]) -> None:
    if process_group.is_main():
        for line in (found.reasons, *(f"{name}: {_describe(one)}" for name, one in rows.items() if one is not None)):
            console().print(line)


def _describe(rows: TokenRows) -> str:
    text = f"{rows.num_documents} documents in {len(rows)} rows, {int(rows.num_tokens.sum())} tokens"
    for count, what in (
        (rows.num_skipped, "bad rows skipped (data.on_bad_row)"),
        (rows.num_truncated, "documents truncated to data.max_length"),
        (rows.num_dropped, "documents dropped: no label token within data.max_length"),
    ):
        text += f"; {count} {what}" if count else ""
    return text
