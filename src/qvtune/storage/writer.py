"""Writing safetensors files piece by piece, several tensors at a time.

``safetensors.torch.save_file`` wants all tensors of a file at once. Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qvtune.storage.atomic import atomic_file
from qvtune.storage.checksum import add_checksums, partial_checksum
from qvtune.storage.files import write_json
from qvtune.storage.safetensors import ALL_DTYPES, INDEX, SINGLE, StoredTensor

_DTYPE_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}

_FLUSH_SECONDS = 0.2

# Name -> the tensor's elements in order, in 1-D pieces of the planned dtype.
Pieces = Callable[[str], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


FilePlans = Mapping[str, Sequence[TensorPlan]]


@dataclass(frozen=True)
class WrittenFile:
    """What a file was when it was written; ``checksum`` is that of ``qvtune.storage.checksum`` over all its bytes."""

    num_bytes: int
    checksum: int


def plan_files(plans: Iterable[TensorPlan], max_shard_bytes: int) -> dict[str, list[TensorPlan]]:
    """File name -> tensors, in the given order and with the names that transformers gives.

    A tensor larger than ``max_shard_bytes`` gets a file of its own.
    """
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }


def write_index(folder: Path, files: Mapping[str, Sequence[TensorPlan | StoredTensor]]) -> None:
    """Write ``INDEX``, which a model of several files needs; nothing for one of a single file."""
    if len(files) > 1:
        total_bytes = sum(tensor.num_bytes for shard in files.values() for tensor in shard)
        weight_map = {tensor.name: name for name, shard in files.items() for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_file(path: Path, plans: Sequence[TensorPlan], pieces: Pieces, num_threads: int = 1) -> WrittenFile:
    """Write one file, which appears when all of it is on the disk; its bytes do not depend on ``num_threads``.

    ``pieces(name)`` is called once for each plan, in one of ``num_threads`` threads. An exception from it, or from a
    disk that is full, is raised here, and nothing is left of the file.
    """
    header, offsets = _layout(plans)
    total = len(header) + sum(plan.num_bytes for plan in plans)
    with atomic_file(path) as private, private.open("wb") as file:
        descriptor = file.fileno()
        os.truncate(descriptor, total)
        checksums = [_write_at(descriptor, torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)]
        largest_first = sorted(plans, key=lambda plan: -plan.num_bytes)  # so that the threads end together
        with ThreadPoolExecutor(num_threads) as pool, _flushing(descriptor):
            try:
                checksums += pool.map(
                    lambda plan: _write_tensor(descriptor, plan, pieces, offsets[plan.name]), largest_first
                )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(descriptor)
    return WrittenFile(total, add_checksums(checksums))


@contextmanager
def _flushing(descriptor: int) -> Iterator[None]:
    """Let the disk work while the tensors are computed, instead of only in the fsync behind them."""
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            os.fdatasync(descriptor)

    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
    flushed.result()  # an error of the disk is told only once, to whoever asks first


def _layout(plans: Sequence[TensorPlan]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins."""
    # Wide dtypes first, so that each tensor begins at a multiple of its element size: readers map the file.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
        starts[plan.name], end = end, end + plan.num_bytes
        span = [starts[plan.name], end]
        header[plan.name] = {"dtype": _DTYPE_NAMES[plan.dtype], "shape": plan.shape, "data_offsets": span}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    before = 8 + len(encoded)
    return len(encoded).to_bytes(8, "little") + encoded, {name: before + start for name, start in starts.items()}


def _write_tensor(descriptor: int, plan: TensorPlan, pieces: Pieces, start: int) -> int:
    position, checksums = start, []
    for piece in pieces(plan.name):
        assert piece.dtype == plan.dtype and piece.dim() == 1, (plan, piece.dtype, piece.shape)
        data = piece.contiguous().view(torch.uint8)
        checksums.append(_write_at(descriptor, data, position))
        position += len(data)
    assert position - start == plan.num_bytes, (plan, position - start)
    return add_checksums(checksums)


def _write_at(descriptor: int, data: torch.Tensor, position: int) -> int:
    """Write bytes (uint8, 1-D) and return what they add to the file's checksum."""
    buffer, written = data.numpy().data, 0
    while written < len(buffer):
        written += os.pwrite(descriptor, buffer[written:], position + written)
    return partial_checksum(data, position)


def checksum_of(path: Path) -> WrittenFile:
    """What ``write_file`` has returned, if the file is still the same."""
    checksums, position = [], 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(2**23):
            checksums.append(partial_checksum(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), position))
            position += len(chunk)
    return WrittenFile(position, add_checksums(checksums))
