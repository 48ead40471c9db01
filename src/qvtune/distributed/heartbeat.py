"""Where this rank is, in memory that it shares with its watcher (qvtune.distributed.hang_watcher).

A beat is a store to memory: no collective, no file system, no system call. This module imports nothing that takes time.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_NUM_BYTES = 256
_HEADER = struct.Struct("=Q?B")  # number of beats, whether silence is limited, bytes of the text


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank: its ``number``, and ``where`` the rank is, such as "step 7, micro-batch 2".

    ``is_limited``: whether another one must follow within ``train.hang_seconds``.
    """

    number: int
    where: str
    is_limited: bool


class Heartbeat:
    """A beat in shared memory: that of ``descriptor``, or new memory."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("qvtune-heartbeat")
            os.ftruncate(descriptor, _NUM_BYTES)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _NUM_BYTES)

    def write(self, beat: Beat) -> None:
        """Replace the beat. Who reads at the same moment may see a part of it."""
        text = beat.where.encode()[: _NUM_BYTES - _HEADER.size]
        self._memory[_HEADER.size : _HEADER.size + len(text)] = text
        _HEADER.pack_into(self._memory, 0, beat.number, beat.is_limited, len(text))

    def read(self) -> Beat:
        """The beat that was written last."""
        number, is_limited, length = _HEADER.unpack_from(self._memory)
        return Beat(number, self._memory[_HEADER.size : _HEADER.size + length].decode(errors="replace"), is_limited)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.descriptor)


_shared: Heartbeat | None = None  # with the watcher, while there is one
_last = Beat(0, "start", True)


def beat(where: str | None = None) -> None:
    """A sign of life of this rank, which is now at ``where`` (None: still where it was)."""
    _write(_last.where if where is None else where, _last.is_limited)


@contextmanager
def unlimited(where: str) -> Iterator[None]:
    """A phase that may be silent however long, such as a download: only a stopped process counts as hung in it."""
    _write(where, is_limited=False)
    try:
        yield
    finally:
        _write(where, is_limited=True)


@contextmanager
def shared(heartbeat: Heartbeat) -> Iterator[None]:
    """Within the block beats are written to ``heartbeat``, which is closed at its end."""
    global _shared
    _shared = heartbeat
    beat("start")
    try:
        yield
    finally:
        _shared = None
        heartbeat.close()


def _write(where: str, is_limited: bool) -> None:
    global _last
    _last = Beat(_last.number + 1, where, is_limited)
    if _shared is not None:
        _shared.write(_last)
