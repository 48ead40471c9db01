"""What can be converted: finding out what a folder is, and opening it."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.state import TRAINED, TrainerState, load_trainer_state, trained_base
from qvtune.config.schema import ModelSection
from qvtune.convert.merge.changes import Adapter, LazyReplacement
from qvtune.convert.sources.deepspeed import open_zero, step_folder
from qvtune.convert.sources.heads import classifier_settings, trained_head
from qvtune.convert.sources.kinds import KINDS, require_source
from qvtune.convert.sources.names import model_names
from qvtune.convert.sources.peft_adapter import peft_adapter
from qvtune.convert.sources.peft_config import CONFIG, WEIGHTS, PeftConfig
from qvtune.errors import UserError
from qvtune.model.adapters import is_of_head
from qvtune.model.fingerprint import Fingerprint
from qvtune.model.head import HeadSettings, is_head_tensor
from qvtune.model.source import is_hub_id
from qvtune.storage.safetensors import StoredTensor, TensorFiles, read_headers

ReadAdapter = Callable[[Mapping[str, StoredTensor]], Adapter]  # a base's tensors -> what is done to them
Kind = Literal["checkpoint", "full", "peft", "deepspeed"]
_PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class SavedAdapter:
    """What PEFT saved, or would have: its configuration, and its tensors under the names of any of its versions.

    ``where`` the tensors come from is for messages.
    """

    where: str
    config: PeftConfig
    tensors: Mapping[str, Tensor]

    def adapter(self, base: Mapping[str, StoredTensor]) -> Adapter:
        """What is to be done to ``base``. Raises UserError listing all that does not fit."""
        return peft_adapter(self.where, self.config, self.tensors, base)


@dataclass(frozen=True)
class Source:
    """What was trained, found and verified, not yet compared with its base.

    ``model`` is the base as trained on, as far as known; ``dtype`` the compute dtype of training (None: not known);
    ``state`` and ``fingerprint`` (of the base) are there for checkpoints of ours. ``read`` gives the adapter for the
    base's tensors; ``saved`` is what it comes from, unless matrices themselves were trained.
    """

    path: Path
    kind: Kind
    model: ModelSection
    dtype: torch.dtype | None
    step: int | None
    state: TrainerState | None
    fingerprint: Fingerprint | None
    adapter: ReadAdapter
    saved: SavedAdapter | None = None


def open_source(path: Path, *, base: str | None = None, allow_pickle: bool = False) -> Source:
    """Find out what ``path`` is, and verify it.

    A checkpoint folder of ours (``checkpoints/latest``, ``checkpoints/best``) or a run folder (its newest); a PEFT
    adapter folder from anywhere; with ``allow_pickle`` a DeepSpeed ZeRO checkpoint of a PEFT model. Where a folder has
    both DeepSpeed's files and an adapter, ``allow_pickle`` chooses the former: fp32 masters. ``base`` overrides the
    folder or hub id of the base. Raises UserError for what cannot be converted, with the reason.
    """
    require_source(path)
    if _is_ours(path):
        return _open_ours(checkpoint_folder.resolve(path), base)
    step = step_folder(path)
    if step is not None and (allow_pickle or not (path / CONFIG).is_file()):
        return _open_deepspeed(step, base, allow_pickle)
    if (path / CONFIG).is_file():
        return _open_peft(path, base, allow_pickle)
    raise UserError(_unknown(path))


def _is_ours(path: Path) -> bool:
    checkpoints = path / "checkpoints"
    has_some = checkpoint_folder.newest(path) is not None
    return has_some or checkpoints.is_dir() or (path / checkpoint_folder.MANIFEST).is_file()


def _open_ours(folder: Path, base: str | None) -> Source:
    checkpoint_folder.verify(folder)
    state = load_trainer_state(folder)
    model = ModelSection(**state.trajectory["model"])
    if base is not None:
        model = model.model_copy(update={"name_or_path": base, "revision": None})
    is_full, head = (folder / TRAINED).is_file(), trained_head(state.trajectory)
    saved = None
    read: ReadAdapter
    if is_full:
        dtype = next((tensor.dtype for tensor in read_headers([folder / TRAINED]).values()), torch.float32)
        read = partial(_full_adapter, folder / TRAINED, dtype)
    else:
        saved = SavedAdapter(str(folder / WEIGHTS), _read_config(folder / CONFIG), load_file(folder / WEIGHTS))
        dtype, read = next((tensor.dtype for tensor in saved.tensors.values()), torch.float32), saved.adapter
    return Source(
        path=folder,
        kind="full" if is_full else "checkpoint",
        model=model,
        dtype=dtype,
        step=state.step,
        state=state,
        fingerprint=trained_base(folder),
        adapter=read if head is None else partial(_with_head, read, head),
        saved=saved,
    )


def _with_head(read: ReadAdapter, head: HeadSettings, base: Mapping[str, StoredTensor]) -> Adapter:
    """The adapter, and what config.json has to say of the head."""
    adapter = read(base)
    return replace(
        adapter, config={**adapter.config, **classifier_settings(head, next(iter(base.values())).file.parent)}
    )


def _open_peft(folder: Path, base: str | None, allow_pickle: bool) -> Source:
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    if file.is_file():
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors ({error}); copy the file again") from error
    else:
        stored = _read_pickle(folder / _PICKLE, allow_pickle)
        file = folder / _PICKLE
    return _foreign(folder, "peft", base, _step(folder), SavedAdapter(str(file), config, stored))


def _read_pickle(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file.parent}: has {CONFIG} but neither {WEIGHTS} nor {_PICKLE}; copy the folder again")
    if not allow_pickle:
        raise UserError(
            f"{file}: is a pickle, which can run code when opened; with --allow-pickle it is opened as tensors only"
        )
    try:
        stored: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: cannot be read as tensors only ({_first_line(error)})") from error
    if not (isinstance(stored, dict) and all(torch.is_tensor(value) for value in stored.values())):
        raise UserError(f"{file}: holds something else than tensors by name")
    return stored


def _open_deepspeed(folder: Path, base: str | None, allow_pickle: bool) -> Source:
    if not allow_pickle:
        raise UserError(
            f"{folder}: DeepSpeed's files are pickles, which can run code when opened; with --allow-pickle they are "
            "opened as tensors only"
        )
    places = [folder, folder.parent, folder.parent.parent]
    config_file = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
    if config_file is None:
        raise UserError(
            f"{folder}: no {CONFIG} beside it or in {folder.parent}: copy it there, it says what the tensors mean (a "
            "checkpoint of a model trained without PEFT cannot be converted; DeepSpeed's zero_to_fp32.py can)"
        )
    config, opened = _read_config(config_file), open_zero(folder)
    return _foreign(folder, "deepspeed", base, opened.step, SavedAdapter(str(folder), config, opened.tensors()))


def _foreign(folder: Path, kind: Kind, base: str | None, step: int | None, saved: SavedAdapter) -> Source:
    """A source that does not say what its base was trained as: taken for the original weights."""
    config = saved.config
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{config.path}: names no base (base_model_name_or_path); give it with --base")
    pinned = base is None and config.get("revision") != "main" and is_hub_id(name)
    model = ModelSection(name_or_path=name, revision=config.get("revision") if pinned else None, quantization="none")
    return Source(folder, kind, model, None, step, state=None, fingerprint=None, adapter=saved.adapter, saved=saved)


def _full_adapter(file: Path, dtype: torch.dtype, base: Mapping[str, StoredTensor]) -> Adapter:
    """Every tensor of ``trained.safetensors`` replaces the base's; a head is added, and the base's own is dropped.

    Raises UserError listing all that do not fit.
    """
    trained = read_headers([file])
    head = {name: tensor for name, tensor in trained.items() if is_of_head(name)}
    names = model_names(trained, [name for name in base if not (head and is_head_tensor(name))])
    problems = [f"{file}: holds no tensors"] if not trained else []
    for name, tensor in trained.items():
        if name not in names and name not in head:
            problems.append(f"{file}: {name} {list(tensor.shape)} has no place in the base")
        elif name in names and tensor.shape != base[names[name]].shape:
            found, expected = list(tensor.shape), list(base[names[name]].shape)
            problems.append(f"{file}: {name} has shape {found}, the base needs {expected}")
    if problems:
        raise UserError([*problems, "the checkpoint and the base must belong together; give another base with --base"])
    files = TensorFiles(file.parent, trained)
    return Adapter(
        changes={names[name]: LazyReplacement(tensor) for name, tensor in trained.items() if name in names},
        dtype=dtype,
        added={name: files.read(name).view(one.shape) for name, one in head.items() if name not in names},
        dropped=frozenset(base.keys() - names.values()),
    )


def _read_config(path: Path) -> PeftConfig:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no object, but {type(values).__name__}")
    return PeftConfig(path, values)


def _step(folder: Path) -> int | None:
    """What transformers' Trainer has left beside the adapter."""
    path = folder / "trainer_state.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("global_step") if path.is_file() else None
    return found if isinstance(found, int) else None


def _unknown(path: Path) -> str:
    inside = sorted(folder.name for folder in path.glob("checkpoint-*") if folder.is_dir()) if path.is_dir() else []
    if inside:
        return f"{path}: holds several checkpoints; give one of them: {', '.join(inside)}"
    if any(path.glob("*.distcp")) or any(path.glob("pytorch_model_fsdp*")):
        return f"{path}: an FSDP checkpoint cannot be converted; save the adapter with save_pretrained and give that"
    if (path / "config.json").is_file():
        return f"{path}: is a model without an adapter ({CONFIG}), so there is nothing to merge"
    return f"{path}: no checkpoint; give {KINDS}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
