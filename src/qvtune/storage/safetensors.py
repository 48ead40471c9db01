"""Reading any range of any tensor of a folder's safetensors files."""

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from qvtune.errors import UserError
from qvtune.storage.checksum import add_checksums, partial_checksum

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    """The tensors of a model folder by name; counts what is read of them, and sums up what it was.

    ``checksums`` and ``not_finite`` cover what this process has read; ``fingerprint.content_of`` adds the other ranks.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    bytes_read: int = field(default=0, init=False)
    checksums: dict[str, int] = field(default_factory=dict, init=False)
    not_finite: set[str] = field(default_factory=set, init=False)

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read_flat(
        self, name: str, start: int = 0, end: int | None = None, *, noted_from: int | None = None
    ) -> torch.Tensor:
        """Elements ``[start, end)`` of the flattened tensor, 1-D, in its stored dtype.

        What is read enters the checksum from element ``noted_from`` on (default: all): where two ranks read the same
        elements, one of them must not note them.
        """
        tensor = self.tensors[name]
        data = self._read(tensor, start, tensor.numel if end is None else end)
        noted = data[0 if noted_from is None else noted_from - start :]
        first_byte = (start if noted_from is None else noted_from) * tensor.dtype.itemsize
        self.checksums[name] = add_checksums([self.checksums.get(name, 0), partial_checksum(noted, first_byte)])
        if data.is_floating_point() and not _all_finite(data):
            self.not_finite.add(name)
        return data

    def files(self) -> list[Path]:
        """Those that hold the tensors."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def stamps(self) -> list[list[str | int]]:
        """Path, bytes and time of change (ns) of each file: what can be said of the content without reading it."""
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files()]

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Only the tensors that ``names`` (new name -> name here) mentions, under their new names; nothing read yet."""
        return replace(self, tensors={new: replace(self.tensors[old], name=new) for new, old in names.items()})

    def peek(self, name: str) -> torch.Tensor:
        """A small tensor whole, 1-D, without noting it: for descriptions that every rank reads."""
        return self._read(self.tensors[name], 0, self.tensors[name].numel)

    def read_bytes(self, name: str, start: int, end: int) -> torch.Tensor:
        """Bytes ``[start, end)`` of a tensor whose dtype is only its packing: 1-D, uint8."""
        tensor = self.tensors[name]
        data = self._read(replace(tensor, dtype=torch.uint8), start, end)
        self.checksums[name] = add_checksums([self.checksums.get(name, 0), partial_checksum(data, start)])
        return data

    def _read(self, tensor: StoredTensor, start: int, end: int) -> torch.Tensor:
        """Plain reads instead of a memory map: its pages would count as this process's memory, its reads not at all."""
        data = torch.empty(end - start, dtype=tensor.dtype)
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * tensor.dtype.itemsize)
            buffer = data.view(torch.uint8).numpy().data
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise UserError(f"{tensor.file}: ends inside tensor {tensor.name!r}; copy the file again")
                self.bytes_read += count
                buffer = buffer[count:]
        return data


@dataclass
class PickledWeights(BaseWeights):
    """Legacy ``.bin`` files, opened with ``weights_only``; memory-mapped, so only what is read becomes resident."""

    mapped: dict[str, torch.Tensor] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """As the others; the mapped tensors too."""
        return replace(super().renamed(names), mapped={new: self.mapped[old] for new, old in names.items()})

    def _read(self, tensor: StoredTensor, start: int, end: int) -> torch.Tensor:
        data = self.mapped[tensor.name].flatten().view(tensor.dtype)[start:end].clone()
        self.bytes_read += data.numel() * data.element_size()
        return data


def _all_finite(data: torch.Tensor) -> bool:
    """NaN and infinity both show in the extremes, found 13 times faster than by ``isfinite`` (bfloat16 on a CPU)."""
    return not len(data) or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(data))


def open_weights(folder: Path, allow_pickle: bool = False, *, any_dtype: bool = False) -> BaseWeights:
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
    return BaseWeights(folder, read_headers(files, ALL_DTYPES if any_dtype else _DTYPES))


def read_headers(files: Sequence[Path], dtypes: Mapping[str, torch.dtype] = _DTYPES) -> dict[str, StoredTensor]:
    """Where each tensor of some safetensors files lies. Raises UserError listing the files that cannot be read."""
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


def _open_pickles(folder: Path, files: list[Path]) -> PickledWeights:
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
    return PickledWeights(folder, tensors, mapped)


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
    return f"{folder}: no weights; expected {SINGLE} or {INDEX} (model.name_or_path)"


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
        if entry["dtype"] not in dtypes:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}; allowed: {', '.join(dtypes)}")
        tensor = StoredTensor(name, file, 8 + size + start, end - start, tuple(entry["shape"]), dtypes[entry["dtype"]])
        if tensor.numel * tensor.dtype.itemsize != tensor.num_bytes:
            raise ValueError(f"tensor {name!r}: {tensor.num_bytes} bytes do not fit shape {list(tensor.shape)}")
        if tensor.offset + tensor.num_bytes > total:
            raise ValueError(f"truncated: tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes} of {total}")
        tensors.append(tensor)
    return tensors
