"""What can be converted: finding out what a folder is, and opening it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from qvtune.base import fingerprint
from qvtune.base.fingerprint import Fingerprint
from qvtune.base.source import StoredTensor
from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.state import TrainerState, load_trainer_state
from qvtune.config.schema import ModelSection
from qvtune.merge.adapter import Adapter
from qvtune.merge.peft_adapter import peft_adapter

Kind = Literal["checkpoint", "full", "peft", "deepspeed"]


@dataclass(frozen=True)
class Source:
    """A trained adapter that has been found and verified, not yet compared with its base.

    ``model`` is the base as trained on, as far as known; ``dtype`` the compute dtype of training (None: not known);
    ``step``, ``state`` and ``fingerprint`` (of the base) are there for checkpoints of ours. ``read`` gives the adapter
    for the base's tensors.
    """

    path: Path
    kind: Kind
    model: ModelSection
    dtype: torch.dtype | None
    step: int | None
    state: TrainerState | None
    fingerprint: Fingerprint | None
    read: Callable[[Mapping[str, StoredTensor]], Adapter]

    def adapter(self, base: Mapping[str, StoredTensor]) -> Adapter:
        """What is to be done to ``base``. Raises UserError listing all that does not fit."""
        return self.read(base)


def open_source(path: Path, *, base: str | None = None, allow_pickle: bool = False) -> Source:
    """Find out what ``path`` is, and verify it.

    A checkpoint folder of ours, or a run folder (its newest). ``base`` overrides the folder or hub id of the base.
    Raises UserError for what cannot be converted, with the reason.
    """
    folder = checkpoint_folder.resolve(path)
    checkpoint_folder.verify(folder)
    state = load_trainer_state(folder)
    model = ModelSection(**state.trajectory["model"])
    if base is not None:
        model = model.model_copy(update={"name_or_path": base})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    return Source(
        path=folder,
        kind="checkpoint",
        model=model,
        dtype=next((tensor.dtype for tensor in stored.values()), torch.float32),
        step=state.step,
        state=state,
        fingerprint=fingerprint.read(folder / "base.json"),
        read=lambda tensors: peft_adapter(file, config, stored, tensors),
    )
