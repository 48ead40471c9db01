"""What a checkpoint holds, taken from and put back into a DeepSpeed engine, by parameter name and whole.

Whole tensors by name do not depend on the number of ranks. All functions that take an engine are collective.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qvtune.distributed import process_group
from qvtune.errors import UserError
from qvtune.model import fingerprint
from qvtune.model.adapters import saved_name, trainable
from qvtune.model.fingerprint import Fingerprint
from qvtune.model.shard import Shard
from qvtune.storage.files import write_json

TRAINED = "trained.safetensors"  # takes the place of the adapter where matrices of the base are trained
_ADAPTER, _BASE = "adapter_model.safetensors", "base.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainerState:
    """Counters of a run: ``step`` of ``max_steps`` are complete.

    ``evaluations``: step -> metrics. ``trajectory``: the settings that decide the losses.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    trajectory: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0


def gather_state(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter name -> ``value`` (as forward uses it), ``master`` (fp32) and the AdamW moments, on the CPU."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # After an evaluation ZeRO-3 is still gathering what it would need next; such parameters cannot be gathered here.
    engine.empty_partition_cache()
    _link_moments(engine.optimizer)
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in trainable(engine.module.model):
        with GatheredParameters([parameter]):
            entry = {"value": parameter.detach().clone()}
        entry["master"] = safe_get_full_fp32_param(parameter)
        for key in _MOMENTS:
            entry[key] = safe_get_full_optimizer_state(parameter, key)
        state[name] = {key: tensor.detach().cpu().contiguous() for key, tensor in entry.items()}
    return state


def save(
    folder: Path,
    state: dict[str, dict[str, torch.Tensor]],
    peft_config: Any | None,
    trainer: TrainerState,
    base: Fingerprint,
) -> None:
    """Write the files of one checkpoint into ``folder`` (one rank).

    ``peft_config`` is that of the adapter, with which PEFT reads it; None where matrices of the base are trained.
    """
    values = {saved_name(name): entry["value"] for name, entry in state.items()}
    save_file(values, folder / (TRAINED if peft_config is None else _ADAPTER), metadata={"format": "pt"})
    kept = {f"{key}/{saved_name(name)}": entry[key] for name, entry in state.items() for key in ("master", *_MOMENTS)}
    save_file(kept, folder / "optimizer.safetensors")
    if peft_config is not None:
        peft_config.save_pretrained(folder)
    write_json(folder / "trainer_state.json", vars(trainer))
    write_json(folder / _BASE, base)


def trained_base(folder: Path) -> Fingerprint:
    """What a checkpoint was trained on. Raises UserError where it does not say."""
    if not (folder / _BASE).is_file():
        raise UserError(f"{folder / _BASE} is missing: the base that was trained on cannot be checked")
    return fingerprint.read(folder / _BASE)


def require_base(folder: Path, found: Fingerprint) -> None:
    """Raises UserError, naming the tensors, when a checkpoint was trained on another base than ``found``."""
    fingerprint.require_same(
        trained_base(folder),
        found,
        "the base (model.name_or_path)",
        f"{folder} was trained on another base; give that one, or another run_dir",
    )


def load_trainer_state(folder: Path) -> TrainerState:
    """The counters of a checkpoint."""
    stored = json.loads((folder / "trainer_state.json").read_text())
    if "eval_losses" in stored:  # written before tasks had other metrics
        stored["evaluations"] = {step: {"loss": loss} for step, loss in stored.pop("eval_losses").items()}
    stored["evaluations"] = {int(step): metrics for step, metrics in stored["evaluations"].items()}
    return TrainerState(**stored)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's values into what ``add_adapters`` has returned, before DeepSpeed's engine is built.

    Matrices of the base are cut by ZeRO-3 already, an adapter's factors are not. Raises UserError on other names.
    """
    path = folder / (_ADAPTER if hasattr(model, "peft_config") else TRAINED)
    stored = load_file(path)
    parameters = {saved_name(name): parameter for name, parameter in trainable(model)}
    _require_same(path, stored.keys(), parameters.keys())
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    problems = [
        f"{folder}: {name} has shape {list(stored[name].shape)}, this run needs {list(shape)} (adapter.rank)"
        for name, shape in shapes.items()
        if stored[name].shape != shape
    ]
    if problems:
        raise UserError(problems)
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.copy_(_own_piece(stored[name]))
        else:
            parameter.data.copy_(stored[name])


def load_optimizer(folder: Path, engine: Any, step: int) -> None:
    """Put masters, moments and AdamW's step count back."""
    _link_moments(engine.optimizer)
    stored = load_file(folder / "optimizer.safetensors")
    for name, parameter in trainable(engine.module.model):
        for key in ("master", *_MOMENTS):
            _set_state(parameter, key, stored[f"{key}/{saved_name(name)}"].to(engine.device))
    for entry in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(entry["step"]):
            entry["step"].fill_(step)
        else:
            entry["step"] = step


def _set_state(parameter: nn.Parameter, key: str, whole: torch.Tensor) -> None:
    """Put a parameter's fp32 master or moment into the optimizer.

    ZeRO-3's setter of whole tensors fails where the ranks do not divide them (DeepSpeed 0.19.8), hence the local one.
    """
    from deepspeed import utils

    if hasattr(parameter, "ds_tensor"):
        set_master, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        value = _own_piece(whole)
    else:
        set_master, set_moment, value = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state, whole
    if key == "master":
        set_master(parameter, value)
    else:
        set_moment(parameter, value, key)


def _own_piece(whole: torch.Tensor) -> torch.Tensor:
    """This rank's part under ZeRO-3, flat, zeros at the end."""
    shard = Shard(process_group.rank(), process_group.world_size())
    start, end = shard.span(whole.numel())
    piece = whole.new_zeros(shard.numel(whole.numel()))
    piece[: end - start] = whole.flatten()[start:end]
    return piece


def _link_moments(zero: Any) -> None:
    """Give AdamW its state, which it makes at its first step, and let ZeRO-2 find each parameter's part of it.

    DeepSpeed 0.19.8 does the latter once, after stepping the first group, when the other groups have no state yet.
    """
    stage_2 = hasattr(zero, "single_partition_of_fp32_groups")
    for partition in zero.single_partition_of_fp32_groups if stage_2 else zero.fp32_partitioned_groups_flat:
        state = zero.optimizer.state[partition]
        if not state:
            state.update(step=torch.tensor(0.0), **{key: torch.zeros_like(partition) for key in _MOMENTS})
    if stage_2:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _require_same(path: Path, found: Any, expected: Any) -> None:
    if problems := [f"{path}: {name} is missing" for name in sorted(expected - found)] + [
        f"{path}: {name} has no place in this run's adapter (adapter.projections)" for name in sorted(found - expected)
    ]:
        raise UserError(problems)
