"""Trained values and AdamW's state, out of and into a DeepSpeed engine (ZeRO-2 or ZeRO-3), by parameter name.

ZeRO cuts the fp32 master and the moments of each parameter into one contiguous range of elements per rank. A rank
sends only its range when a checkpoint is gathered on rank 0, and reads only its range when one is loaded. All functions
that take an engine are collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.checkpoint.state import ADAPTER, OPTIMIZER, STATES, TRAINED, TrainedState
from qvtune.distributed import process_group
from qvtune.errors import UserError
from qvtune.model.adapters import saved_name, trainable
from qvtune.model.shard import Shard, release_gathered
from qvtune.storage.safetensors import TensorFiles, read_headers

_MESSAGE_BYTES = 2**26  # of all ranks together, from which on pieces are sent; rank 0 holds as much twice


def gather_state(engine: Any) -> TrainedState:
    """All trained parameters with their optimizer state, whole, on rank 0; an empty mapping on other ranks.

    The tensors are copies. Many pieces are sent as one message: a message for each takes most of the time.
    """
    release_gathered(engine)
    _link_moments(engine.optimizer)
    parameters = trainable(engine.module.model)
    spans = process_group.all_gather_object([_own_span(parameter) for _, parameter in parameters])
    state: TrainedState = {name: {} for name, _ in parameters} if process_group.is_main() else {}
    batch: list[_Piece] = []
    for (name, parameter), of_ranks in zip(parameters, zip(*spans, strict=True), strict=True):
        if hasattr(parameter, "ds_tensor"):
            start, end = _own_span(parameter)
            batch.append(_Piece(name, "value", parameter.ds_tensor[: end - start], of_ranks))
        elif process_group.is_main():
            state[name]["value"] = parameter.detach().flatten().cpu().clone()
        batch += [_Piece(name, key, _own_state(parameter, key), of_ranks) for key in STATES]
        if sum(sum(piece.bytes_of_ranks()) for piece in batch) >= _MESSAGE_BYTES:
            _gather(batch, state)
            batch = []
    _gather(batch, state)
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters}
    return {name: {key: tensor.view(shapes[name]) for key, tensor in entry.items()} for name, entry in state.items()}


@dataclass(frozen=True)
class _Piece:
    """This rank's range of one tensor of the state, 1-D, and the ranges of all ranks."""

    name: str
    key: str
    own: torch.Tensor
    spans: tuple[tuple[int, int], ...]

    def bytes_of_ranks(self) -> list[int]:
        return [(end - start) * self.own.element_size() for start, end in self.spans]


def _gather(batch: Sequence[_Piece], state: TrainedState) -> None:
    """On rank 0 put the pieces of all ranks together, in ``state``."""
    if not batch:
        return
    sizes = list(zip(*(piece.bytes_of_ranks() for piece in batch), strict=True))  # [ranks][pieces]
    own = torch.cat([piece.own.detach().cpu().contiguous().view(torch.uint8) for piece in batch])
    whole = process_group.gather_on_main(own, list(map(sum, sizes)))
    if whole is None:
        return
    of_ranks = [
        part.split(list(lengths)) for part, lengths in zip(whole.split(list(map(sum, sizes))), sizes, strict=True)
    ]
    for piece, parts in zip(batch, zip(*of_ranks, strict=True), strict=True):
        state[piece.name][piece.key] = torch.cat(parts).view(piece.own.dtype)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's values into what ``add_adapters`` has returned, before DeepSpeed's engine is built.

    Matrices of the base are cut by ZeRO-3 already: a rank reads its range. An adapter's factors are not.
    Raises UserError listing all names, or all shapes, that differ.
    """
    path = folder / (ADAPTER if hasattr(model, "peft_config") else TRAINED)
    files = TensorFiles(folder, read_headers([path]))
    parameters = {saved_name(name): parameter for name, parameter in trainable(model)}
    if problems := [f"{path}: {name} is missing" for name in sorted(parameters.keys() - files.keys())] + [
        f"{path}: {name} has no place in this run's adapter (adapter.projections)"
        for name in sorted(files.keys() - parameters.keys())
    ]:
        raise UserError(problems)
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    if problems := [
        f"{folder}: {name} has shape {list(files[name].shape)}, this run needs {list(shape)} (adapter.rank)"
        for name, shape in shapes.items()
        if files[name].shape != shape
    ]:
        raise UserError(problems)
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_tensor"):
            start, end = _own_span(parameter)
            parameter.ds_tensor[: end - start].copy_(files.read(name, start, end))
        else:
            parameter.data.copy_(files.read(name).view(parameter.shape))


def load_optimizer(folder: Path, engine: Any, step: int) -> None:
    """Put this rank's range of masters and moments back, and AdamW's step count."""
    _link_moments(engine.optimizer)
    values = folder / (ADAPTER if hasattr(engine.module.model, "peft_config") else TRAINED)
    files = TensorFiles(folder, read_headers([values, folder / OPTIMIZER]))
    for name, parameter in trainable(engine.module.model):
        for key in STATES:
            stored = f"{key}/{saved_name(name)}"
            if key == "master" and stored not in files:  # it is what forward uses
                stored = saved_name(name)
            _set_own_state(parameter, key, files.read(stored, *_own_span(parameter)))
    for entry in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(entry["step"]):
            entry["step"].fill_(step)
        else:
            entry["step"] = step


def _own_span(parameter: Any) -> tuple[int, int]:
    """``[start, end)`` of the elements of a parameter whose optimizer state this rank has."""
    if hasattr(parameter, "ds_tensor"):
        return Shard(process_group.rank(), process_group.world_size()).span(parameter.ds_numel)
    if parameter._hp_mapping is None:  # ZeRO-2 cuts a group of parameters at once: some ranks have nothing of this one
        return 0, 0
    address = parameter._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def _own_state(parameter: Any, key: str) -> torch.Tensor:
    """This rank's range of the fp32 master or of a moment, 1-D."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_tensor"):
        return torch.empty(0) if parameter._hp_mapping is None else _fragment(parameter, key)
    start, end = _own_span(parameter)
    padded: torch.Tensor = (
        utils.safe_get_local_fp32_param(parameter)
        if key == "master"
        else utils.safe_get_local_optimizer_state(parameter, key)
    )
    return padded[: end - start]


def _set_own_state(parameter: Any, key: str, own: torch.Tensor) -> None:
    from deepspeed import utils

    if not hasattr(parameter, "ds_tensor"):
        if parameter._hp_mapping is not None:
            _fragment(parameter, key).copy_(own)
        return
    padded = torch.zeros(parameter.ds_tensor.numel(), dtype=own.dtype, device=parameter.ds_tensor.device)
    padded[: len(own)] = own
    if key == "master":
        utils.safe_set_local_fp32_param(parameter, padded)
    else:
        utils.safe_set_local_optimizer_state(parameter, padded, key)


def _fragment(parameter: Any, key: str) -> torch.Tensor:
    """ZeRO-2: this rank's range, a view of the optimizer's own tensor."""
    fragment: torch.Tensor = parameter._hp_mapping.get_hp_fragment(None if key == "master" else key)
    return fragment.data


def _link_moments(zero: Any) -> None:
    """Give AdamW its state, which it makes at its first step, and let ZeRO-2 find each parameter's part of it.

    DeepSpeed 0.19.8 does the latter once, after stepping the first group, when the other groups have no state yet.
    """
    stage_2 = hasattr(zero, "single_partition_of_fp32_groups")
    for partition in zero.single_partition_of_fp32_groups if stage_2 else zero.fp32_partitioned_groups_flat:
        state = zero.optimizer.state[partition]
        if not state:
            state.update(step=torch.tensor(0.0), **{key: torch.zeros_like(partition) for key in STATES[1:]})
    if stage_2:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
