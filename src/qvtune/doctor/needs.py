"""What a run needs of memory and disk, as far as headers and settings tell. Everything in bytes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from qvtune.config.deepspeed import find_json
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.model.families import FAMILIES
from qvtune.storage.safetensors import TensorFiles, open_weights

_NF4_BYTES = {True: (4 + 8 / 64 + 32 / 16384) / 8, False: (4 + 32 / 64) / 8}  # a weight, by double_quant
_PROCESS = 700 << 20  # what a rank takes before it holds anything (measured: imports and gloo)
_OPTIMIZER_BYTES = 16  # a trained parameter: float32 value, master and two moments


@dataclass(frozen=True)
class Needs:
    """``base``: resident on one rank; ``process``: beside it, without activations; ``checkpoint``: one on disk."""

    base: int
    process: int
    checkpoint: int


def needs_of(config: RunConfig, weights: TensorFiles, world_size: int, dtype: torch.dtype) -> Needs:
    """An estimate from the tensors' headers."""
    family = FAMILIES[json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))["model_type"]]
    trained = tuple(f".{family.projections[name]}" for name in config.adapter.projections if name in family.projections)
    full = config.adapter.method == "full"
    base = parameters = 0
    for name, shape in _matrices(weights).items():
        numel, is_matrix = math.prod(shape), len(shape) == 2
        is_trained = is_matrix and name.removesuffix(".weight").endswith(trained)
        if is_trained:
            parameters += numel if full else config.adapter.rank * sum(shape)
        in_nf4 = config.model.quantization == "nf4" and is_matrix and ".layers." in f".{name}"
        if in_nf4 and not (is_trained and full):
            base += int(numel * _NF4_BYTES[config.model.double_quant])
        else:
            base += numel * dtype.itemsize
    share = -(-base // world_size) if _stage(config) == 3 else base
    largest = max(math.prod(shape) for shape in _matrices(weights).values()) * dtype.itemsize
    process = _PROCESS + largest + _OPTIMIZER_BYTES * parameters // world_size
    return Needs(share, process, _OPTIMIZER_BYTES * parameters + (1 << 20))


def open_folder(config: RunConfig) -> TensorFiles | None:
    """The base's headers where a folder is given; None for `demo` and hub ids, whose files lie in each user's cache.

    Raises UserError when the folder cannot be read.
    """
    folder = Path(config.model.name_or_path).expanduser()
    if config.model.name_or_path == "demo" or (not folder.exists() and config.model.name_or_path.count("/") == 1):
        return None
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path: {folder} is not a folder with a config.json here")
    return open_weights(folder, config.model.allow_pickle)


def _matrices(weights: TensorFiles) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor as the model has it; of one that is stored in 4 bits its own, its statistics left out."""
    marker = ".weight.quant_state."
    packed = {
        name.partition(marker)[0]: tuple(json.loads(bytes(weights.read(name).tolist()))["shape"])
        for name in weights
        if marker in name
    }
    return {
        name: packed.get(name.removesuffix(".weight"), tensor.shape)
        for name, tensor in weights.items()
        if ".weight." not in name
    }


def _stage(config: RunConfig) -> int:
    content = json.loads(find_json(config.deepspeed).read_text(encoding="utf-8"))
    return int(content.get("zero_optimization", {}).get("stage", 3))
