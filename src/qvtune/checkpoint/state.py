"""The files of a checkpoint: whole tensors by parameter name, which do not depend on the number of ranks."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from qvtune.errors import UserError
from qvtune.model import fingerprint
from qvtune.model.adapters import saved_name
from qvtune.model.fingerprint import Fingerprint
from qvtune.storage.files import write_json
from qvtune.storage.safetensors import TensorFiles, read_headers

TRAINED = "trained.safetensors"  # takes the place of the adapter where matrices of the base are trained
ADAPTER, OPTIMIZER, _BASE = "adapter_model.safetensors", "optimizer.safetensors", "base.json"
_PROBLEMS_SHOWN = 10
STATES = ("master", "exp_avg", "exp_avg_sq")  # fp32 master and AdamW's moments

# Parameter name -> "value" (as forward uses it, in the compute dtype) and STATES; on the CPU.
TrainedState = dict[str, dict[str, torch.Tensor]]


@dataclass
class TrainerState:
    """Counters of a run: ``step`` of ``max_steps`` are complete.

    ``evaluations``: step -> metrics. ``generated_at``: the last step after which prompts were answered; -1: none.
    ``trajectory``: the settings that decide the losses.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    trajectory: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    generated_at: int = -1


def save(
    folder: Path,
    state: TrainedState,
    peft_config: Any | None,
    trainer: TrainerState,
    base: Fingerprint,
) -> None:
    """Write the files of one checkpoint into ``folder``; called on rank 0 alone.

    ``peft_config`` is that of the adapter, with which PEFT reads it; None where matrices of the base are trained.
    """
    values = {saved_name(name): entry["value"] for name, entry in state.items()}
    save_file(values, folder / (TRAINED if peft_config is None else ADAPTER), metadata={"format": "pt"})
    save_file(_optimizer_tensors(state), folder / OPTIMIZER)
    if peft_config is not None:
        peft_config.save_pretrained(folder)
    write_json(folder / "trainer_state.json", vars(trainer))
    write_json(folder / _BASE, base)


def _optimizer_tensors(state: TrainedState) -> dict[str, torch.Tensor]:
    """Masters and moments by their names in OPTIMIZER. Where forward uses the master itself, it is not there twice."""
    return {
        f"{key}/{saved_name(name)}": entry[key]
        for name, entry in state.items()
        for key in STATES
        if key != "master" or not same_bytes(entry[key], entry["value"])
    }


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors on the CPU have one dtype and the same content; computed without a thread but this one."""
    return first.dtype == second.dtype and np.array_equal(_as_bytes(first), _as_bytes(second))


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    content: NDArray[np.uint8] = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return content


def require_written(folder: Path, state: TrainedState) -> None:
    """Read the tensors of a checkpoint. Raises OSError, naming them, where they are not those of ``state``."""
    (values,) = (path for name in (ADAPTER, TRAINED) if (path := folder / name).exists())
    files = TensorFiles(folder, read_headers([values, folder / OPTIMIZER]))
    expected = {saved_name(name): entry["value"] for name, entry in state.items()} | _optimizer_tensors(state)
    wrong = [
        name
        for name, tensor in expected.items()
        if not np.array_equal(files.read_bytes(name).numpy(), _as_bytes(tensor))
    ]
    if wrong:
        raise OSError(f"{folder}: what was written is not what is read back: {', '.join(wrong[:_PROBLEMS_SHOWN])}")


def require_sound(state: TrainedState, step: int) -> None:
    """Raises RuntimeError, naming the tensors, where one is empty, is not finite, or has become all zero.

    Matrices are never all zero but for B of LoRA, which begins so; a bias may be.
    """
    problems = []
    for name, entry in state.items():
        for key, tensor in entry.items():
            if not tensor.numel():
                problems.append(f"{name}: {key} is empty")
            elif not tensor.isfinite().all():
                problems.append(f"{name}: {key} is not finite")
        value = entry["value"]
        if value.dim() > 1 and value.numel() and not value.any() and "lora_B" not in name:
            problems.append(f"{name}: value is all zero")
    if problems:
        first = "\n".join(problems[:_PROBLEMS_SHOWN])
        raise RuntimeError(f"step {step} is not saved, {len(problems)} problems; earlier checkpoints stay:\n{first}")


def trained_base(folder: Path) -> Fingerprint:
    """What a checkpoint was trained on. Raises UserError where it does not say."""
    if not (folder / _BASE).is_file():
        raise UserError(f"{folder / _BASE} is missing: the base that was trained on cannot be checked")
    return fingerprint.read(folder / _BASE)


def require_base(folder: Path, found: Fingerprint, *, same_heads: bool = True) -> None:
    """Raises UserError, naming the tensors, when a checkpoint was trained on another base than ``found``.

    ``same_heads``: as in ``fingerprint.require_same``.
    """
    fingerprint.require_same(
        trained_base(folder),
        found,
        "the base (model.name_or_path)",
        f"{folder} was trained on another base; give that one, or another run_dir",
        same_heads=same_heads,
    )


def load_trainer_state(folder: Path) -> TrainerState:
    """The counters of a checkpoint."""
    stored = json.loads((folder / "trainer_state.json").read_text())
    if "eval_losses" in stored:  # written before tasks had other metrics
        stored["evaluations"] = {step: {"loss": loss} for step, loss in stored.pop("eval_losses").items()}
    stored["evaluations"] = {int(step): metrics for step, metrics in stored["evaluations"].items()}
    return TrainerState(**stored)
