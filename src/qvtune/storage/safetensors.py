"""Reading any range of any tensor of a folder's safetensors files."""

import json
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from qvtune.errors import UserError

# https://huggingface.co/docs/safetensors: 8 bytes little-endian header size, a JSON header, the data.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# Whatever a folder's tensors may be where most are only copied: old position_ids, causal masks.
ALL_DTYPES = _DTYPES | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
COMPUTED = "position_ids"  # the end of names of int64 buffers in old checkpoints, which transformers computes now
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What reading and taking apart somebody else's JSON can raise.
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored: ``num_bytes`` from ``offset`` of ``file``."""

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
class TensorSource(Mapping[str, StoredTensor], ABC):
    """Tensors by name: their shapes and dtypes at once, any range of their elements when it is asked for."""

    folder: Path
    tensors: dict[str, StoredTensor]

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @abstractmethod
    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements ``[start, end)`` of the flattened tensor (``end`` None: to its end), 1-D, in its stored dtype."""

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def stamps(self) -> list[list[str | int]]:
        """Path, bytes and time of change (ns) of each file: what identifies the content without reading it."""
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files()]

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Only the tensors that ``names`` (new name -> name here) mentions, under their new names."""
        return replace(self, tensors={new: replace(self.tensors[old], name=new) for new, old in names.items()})


@dataclass
class TensorFiles(TensorSource):
    """The tensors of safetensors files. Reading changes nothing but ``bytes_read``, which counts it."""

    bytes_read: int = field(default=0, init=False)

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """As ``TensorSource``. Raises UserError where the file ends before the tensor."""
        tensor = self.tensors[name]
        return self._read(tensor, tensor.dtype, start, tensor.numel if end is None else end)

    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Bytes ``[start, end)`` of a tensor, 1-D, uint8: for tensors whose dtype is only their packing."""
        tensor = self.tensors[name]
        return self._read(tensor, torch.uint8, start, tensor.num_bytes if end is None else end)

    def _read(self, tensor: StoredTensor, dtype: torch.dtype, start: int, end: int) -> torch.Tensor:
        """Plain reads instead of a memory map: its pages would count as this process's memory, its reads not at all."""
        data = torch.empty(end - start, dtype=dtype)
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * dtype.itemsize)
            buffer = data.view(torch.uint8).numpy().data
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise UserError(f"{tensor.file}: ends inside tensor {tensor.name!r}; copy the file again")
                self.bytes_read += count
                buffer = buffer[count:]
        return data


@dataclass
class PickledFiles(TensorFiles):
    """Legacy ``.bin`` files, opened with ``weights_only``; memory-mapped, so only what is read becomes resident."""

    mapped: dict[str, torch.Tensor] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """As ``TensorSource``; the mapped tensors too."""
        return replace(super().renamed(names), mapped={new: self.mapped[old] for new, old in names.items()})

    def _read(self, tensor: StoredTensor, dtype: torch.dtype, start: int, end: int) -> torch.Tensor:
        data = self.mapped[tensor.name].flatten().view(dtype)[start:end].clone()
        self.bytes_read += data.numel() * data.element_size()
        return data


def open_weights(folder: Path, allow_pickle: bool = False, *, any_dtype: bool = False) -> TensorFiles:
    """Read the headers of a folder's safetensors files, or with ``allow_pickle`` of its legacy ``.bin`` files.

    Raises UserError with everything that is wrong: no weights, pickle only, missing, truncated or unreadable files,
    dtypes other than fp32, fp16, bf16 and (packed 4-bit weights) uint8; ``any_dtype`` allows fp64, integers and bool.
    """
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _indexed_files(folder / INDEX)
    elif allow_pickle and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        return _open_pickles(folder, pickles)
    else:
        raise UserError(_no_weights(folder))
    return TensorFiles(folder, read_headers(files, ALL_DTYPES if any_dtype else _DTYPES))


def read_headers(files: Sequence[Path], dtypes: Mapping[str, torch.dtype] = _DTYPES) -> dict[str, StoredTensor]:
    """Where each tensor of some safetensors files is stored. Raises UserError listing the files that cannot be read."""
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= {tensor.name: tensor for tensor in _read_header(file, dtypes)}
        except _MALFORMED as error:
            problems.append(f"{file}: cannot be read as safetensors ({error}); copy the file again")
    if problems:
        raise UserError(problems)
    return tensors


def _open_pickles(folder: Path, files: list[Path]) -> PickledFiles:
    mapped: dict[str, torch.Tensor] = {}
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            mapped |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{file}: cannot be read as tensors only ({error})") from error
        for name, value in mapped.items():
            size = value.numel() * value.element_size()
            tensors.setdefault(name, StoredTensor(name, file, 0, size, tuple(value.shape), value.dtype))
    return PickledFiles(folder, tensors, mapped)


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
            "convert the model to safetensors and give that folder, or set model.allow_pickle: true, which opens them "
            "as tensors only"
        )
    return f"{folder}: no weights; expected {SINGLE} or {INDEX}"


def _read_header(file: Path, dtypes: Mapping[str, torch.dtype]) -> list[StoredTensor]:
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
        if entry["dtype"] not in dtypes and name.endswith(COMPUTED):
            continue
        if entry["dtype"] not in dtypes:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}; allowed: {', '.join(dtypes)}")
        tensor = StoredTensor(name, file, 8 + size + start, end - start, tuple(entry["shape"]), dtypes[entry["dtype"]])
        if tensor.numel * tensor.dtype.itemsize != tensor.num_bytes:
            raise ValueError(f"tensor {name!r}: {tensor.num_bytes} bytes do not fit shape {list(tensor.shape)}")
        if tensor.offset + tensor.num_bytes > total:
            raise ValueError(f"truncated: tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes} of {total}")
        tensors.append(tensor)
    return tensors
