"""The trained parameters of a DeepSpeed ZeRO checkpoint, put together from the ranks' fp32 masters without DeepSpeed.

ZeRO-1 and -2: each parameter group is one flat vector, parameter after parameter with the paddings that the files give,
cut into equal parts, one a rank. ZeRO-3: each parameter is cut into ceil(numel / ranks) elements a rank, the last part
padded; a rank's vectors hold its parts one after the other. Frozen parameters are in no optimizer.

The files are pickles. They are opened as tensors only; the few objects of DeepSpeed's in them (a loss scaler, an enum)
become empty stand-ins, so that no code but this one runs.
"""

import math
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from qvtune.errors import UserError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STAGE_2, _STAGE_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"


class _StandIn:
    """What an object of DeepSpeed's becomes: nothing that can do anything."""

    def __new__(cls, *_arguments: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        pass


def step_folder(path: Path) -> Path | None:
    """The ``global_step*`` folder that a user means: itself, or the one that ``latest`` in ``path`` names.

    Raises UserError where ``latest`` is missing among several, or names none.
    """
    if any(_OPTIMIZER_FILE.fullmatch(file.name) for file in path.glob("*_optim_states.pt")):
        return path
    steps = sorted(folder for folder in path.glob("global_step*") if folder.is_dir())
    latest = path / "latest"
    if not steps:
        return None
    if not latest.is_file():
        if len(steps) == 1:
            return steps[0]
        raise UserError(f"{path}: holds {len(steps)} folders global_step* and no file `latest`; give one of them")
    named = path / latest.read_text(encoding="utf-8").strip()
    if named not in steps:
        raise UserError(f"{latest}: names {named.name!r}; there are {', '.join(step.name for step in steps)}")
    return named


@dataclass(frozen=True)
class ZeroCheckpoint:
    """The opened files of one step: masters memory-mapped, nothing read yet but descriptions.

    ``shapes``: for each parameter group, the parameters in their order. ``partitions``: for each rank, its vectors.
    ``paddings``: elements after each parameter (ZeRO-2 of newer versions). ``values``: parameters as forward used them,
    where the files have them (ZeRO-2).
    """

    folder: Path
    stage: int
    step: int | None
    shapes: Sequence[Mapping[str, Sequence[int]]]
    partitions: Sequence[Sequence[Tensor]]
    paddings: Sequence[Sequence[int]] | None
    shared: Mapping[str, str]
    values: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Name of a trained parameter -> fp32 master. Raises UserError where the files do not belong together."""
        gathered = dict(self._stage_3() if self.stage == 3 else self._stage_2())
        differing = [
            name for name, value in self.values.items() if name in gathered and not _near(gathered[name], value)
        ]
        if differing:
            found = ", ".join(differing[:3])
            raise UserError(f"{self.folder}: masters and weights of {found} differ: files of different runs or steps")
        return gathered | {alias: gathered[name] for alias, name in self.shared.items() if name in gathered}

    def _stage_2(self) -> Iterator[tuple[str, Tensor]]:
        for group, shapes in enumerate(self.shapes):
            flat = torch.cat([own[group] for own in self.partitions])
            paddings = self.paddings[group] if self.paddings else [0] * len(shapes)
            sizes = [math.prod(shape) + padding for shape, padding in zip(shapes.values(), paddings, strict=True)]
            self._require_size(sum(sizes), len(flat), slack=2 * len(self.partitions))
            for (name, shape), start in zip(shapes.items(), accumulate(sizes, initial=0), strict=False):
                yield name, flat[start : start + math.prod(shape)].view(*shape)

    def _stage_3(self) -> Iterator[tuple[str, Tensor]]:
        shapes = {name: shape for group in self.shapes for name, shape in group.items()}
        own = [torch.cat([vector.flatten() for vector in vectors]) for vectors in self.partitions]
        sizes = [-(-math.prod(shape) // len(own)) for shape in shapes.values()]
        self._require_size(sum(sizes), len(own[0]), slack=1)
        for (name, shape), start, size in zip(shapes.items(), accumulate(sizes, initial=0), sizes, strict=False):
            parts = torch.cat([vector[start : start + size] for vector in own])
            yield name, parts[: math.prod(shape)].view(*shape)

    def _require_size(self, needed: int, found: int, slack: int) -> None:
        if not needed <= found < needed + slack:
            problem = f"the parameters take {needed} elements, the files hold {found}: they do not belong together"
            raise UserError(f"{self.folder}: {problem}")


def open_zero(folder: Path) -> ZeroCheckpoint:
    """Open a ``global_step*`` folder.

    Raises UserError listing all that is wrong: missing or unreadable files, files of other numbers of ranks, model
    parallelism, optimizer states without fp32 masters.
    """
    files = _optimizer_files(folder)
    states = _load_all([*files, _model_file(folder)])
    optimizer = [state.get("optimizer_state_dict") or {} for state in states[:-1]]
    problems = list(_partition_problems(folder, files, optimizer))
    if problems:
        raise UserError([*problems, f"{folder}: copy all files of one checkpoint, written by all ranks of one run"])
    model = states[-1]
    key = _STAGE_3 if _STAGE_3 in optimizer[0] else _STAGE_2
    if not model.get("param_shapes"):
        raise UserError(f"{folder}: the model states name no parameters (param_shapes); is the checkpoint complete?")
    return ZeroCheckpoint(
        folder=folder,
        stage=3 if key == _STAGE_3 else 2,
        step=model.get("global_steps"),
        shapes=model["param_shapes"],
        partitions=[_vectors(state[key]) for state in optimizer],
        paddings=optimizer[0].get("param_alignment_paddings"),
        shared=model.get("shared_params") or {},
        values=model.get("module") or {} if key == _STAGE_2 else {},
    )


def _optimizer_files(folder: Path) -> list[Path]:
    """By rank. Raises UserError for model parallelism and for ranks that are missing between others."""
    found: dict[int, Path] = {}
    problems = []
    for file in sorted(folder.glob("*_optim_states.pt")):
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match is None or int(match[2]) != 0:
            problems.append(
                f"{file}: only data parallelism can be put together, not tensor, pipeline or expert parallelism"
            )
        elif (rank := int(match[1])) in found:
            problems.append(f"{file}: rank {rank} is there twice ({found[rank].name})")
        else:
            found[rank] = file
    problems += [
        f"{folder}: the optimizer states of rank {rank} are missing"
        for rank in range(max(found, default=0))
        if rank not in found
    ]
    if problems:
        raise UserError(problems)
    return [found[rank] for rank in sorted(found)]


def _model_file(folder: Path) -> Path:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no *_model_states.pt of rank 0, which names the parameters")


def _load_all(files: Sequence[Path]) -> list[dict[str, Any]]:
    states, problems = [], []
    for file in files:
        try:
            states.append(_load(file))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            problems.append(f"{file}: cannot be read as tensors only ({str(error).partition(chr(10))[0]})")
    if problems:
        raise UserError(problems)
    return states


def _load(file: Path) -> dict[str, Any]:
    """Tensors, numbers and containers of a file, memory-mapped; raises ValueError for other people's objects."""
    names = get_unsafe_globals_in_checkpoint(file)
    if foreign := sorted(name for name in names if not name.startswith("deepspeed.")):
        raise ValueError(f"it holds objects of {', '.join(foreign)}")
    with safe_globals([(_StandIn, name) for name in names]):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict")
    return state


def _partition_problems(folder: Path, files: Sequence[Path], optimizer: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    counts = []
    for file, state in zip(files, optimizer, strict=True):
        if _STAGE_2 not in state and _STAGE_3 not in state:
            yield f"{file}: holds no fp32 masters ({_STAGE_2} or {_STAGE_3}); ZeRO-1, -2 and -3 can be converted"
        else:
            count = state.get("partition_count")
            counts.append(max(count) if isinstance(count, list) else count)
    if len(Counter(counts)) > 1:
        ranks = ", ".join(f"{count} files of {ranks} ranks" for ranks, count in Counter(counts).items())
        yield f"{folder}: holds files of different runs: {ranks}"
    elif counts and counts[0] != len(files):
        missing = range(len(files), counts[0] or 0)
        yield from (f"{folder}: the optimizer states of rank {rank} of {counts[0]} are missing" for rank in missing)
        if not missing:
            yield f"{folder}: holds files of {len(files)} ranks, written by {counts[0]}"


def _vectors(found: Any) -> list[Tensor]:
    return [vector.detach() for vector in ([found] if torch.is_tensor(found) else found)]


def _near(master: Tensor, value: Tensor) -> bool:
    """Whether a weight is its master, rounded to the weight's dtype."""
    if not value.is_floating_point() or value.shape != master.shape:
        return value.numel() == 0
    return torch.allclose(master.to(value.dtype).float(), value.float(), rtol=2**-7, atol=1e-6)
