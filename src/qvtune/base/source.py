"""Reading a model folder: configuration, tokenizer, and any range of any tensor of its safetensors files."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qvtune.errors import UserError

# https://huggingface.co/docs/safetensors: 8 bytes little-endian header size, a JSON header, the data.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What reading and taking apart somebody else's JSON can raise.
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``num_bytes`` from ``offset`` of ``file``."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass
class BaseWeights(Mapping[str, StoredTensor]):
    """The tensors of a model folder by name; counts what is read of them."""

    folder: Path
    tensors: dict[str, StoredTensor]
    bytes_read: int = field(default=0, init=False)

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read_flat(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements ``[start, end)`` of the flattened tensor, 1-D, in its stored dtype.

        Plain reads instead of a memory map: pages of a map count as this process's memory, and what is read is known.
        """
        tensor = self.tensors[name]
        end = tensor.numel if end is None else end
        data = torch.empty(end - start, dtype=tensor.dtype)
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * tensor.dtype.itemsize)
            buffer = data.view(torch.uint8).numpy().data
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise UserError(f"{tensor.file}: ends inside tensor {name!r}; copy the file again")
                self.bytes_read += count
                buffer = buffer[count:]
        return data


def open_weights(folder: Path) -> BaseWeights:
    """Read the headers of a folder's safetensors files.

    Raises UserError with everything that is wrong: no weights, pickle only, missing, truncated or unreadable files,
    dtypes other than fp32, fp16 and bf16.
    """
    if (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    elif (folder / _INDEX).is_file():
        files = _indexed_files(folder / _INDEX)
    else:
        raise UserError(_no_weights(folder))
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= {tensor.name: tensor for tensor in _read_header(file)}
        except _MALFORMED as error:
            problems.append(f"{file}: cannot be read as safetensors ({error}); copy the file again")
    if problems:
        raise UserError(problems)
    return BaseWeights(folder, tensors)


def _indexed_files(index: Path) -> list[Path]:
    try:
        return sorted({index.parent / name for name in json.loads(index.read_text())["weight_map"].values()})
    except _MALFORMED as error:
        raise UserError(f"{index}: is no index of safetensors files ({error!r}); copy the file again") from error


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: only pickle files ({', '.join(pickles[:3])}), which can run code when opened; "
            "convert the model to safetensors (save_pretrained of a model you trust) and give that folder"
        )
    return f"{folder}: no weights; expected {_SINGLE} or {_INDEX} (model.name_or_path)"


def _read_header(file: Path) -> list[StoredTensor]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        total = file.stat().st_size
        if not 2 <= size <= total - 8:
            raise ValueError(f"its header claims {size} bytes, the file has {total}")
        header: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}; allowed: {', '.join(_DTYPES)}")
        tensor = StoredTensor(name, file, 8 + size + start, end - start, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        if tensor.numel * tensor.dtype.itemsize != tensor.num_bytes:
            raise ValueError(f"tensor {name!r}: {tensor.num_bytes} bytes do not fit shape {list(tensor.shape)}")
        if tensor.offset + tensor.num_bytes > total:
            raise ValueError(f"truncated: tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes} of {total}")
        tensors.append(tensor)
    return tensors


def model_folder(name_or_path: str, cache_dir: Path) -> Path:
    """The folder of a base model; ``demo`` = the embedded SmolLM2-135M, converted into the cache at its first use."""
    if name_or_path == "demo":
        from qvtune.base.demo import demo_model

        return demo_model(cache_dir)
    folder = Path(name_or_path).expanduser()
    if not (folder / "config.json").is_file():
        what = "is a folder without config.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"model.name_or_path: {name_or_path!r} {what}; give the folder of a Hugging Face model "
            "(config.json, tokenizer, *.safetensors), or `demo`. Hub ids: download the model first."
        )
    return folder
