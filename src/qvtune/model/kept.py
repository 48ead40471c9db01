"""A base that stays in memory between the runs of one process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qvtune.model.fingerprint import ContentChecksums
from qvtune.model.shard import Shard

Value = TypeVar("Value")
Keep = Callable[[str, Callable[[], Any]], Any]  # a name and how to read it -> what has been read


def read_again(name: str, read: Callable[[], Value]) -> Value:
    """For a process that keeps nothing."""
    return read()


class KeptBase:
    """What has been read and quantized of one base, with its checksums: in host memory, beside what the model holds.

    Give each process its own, to all of its runs.
    """

    def __init__(self) -> None:
        self._identity: tuple[Any, ...] = ()
        self._kept: dict[str, tuple[Any, dict[str, int]]] = {}

    def of(self, checksums: ContentChecksums, dtype: torch.dtype, shard: Shard) -> Keep:
        """How the base that ``checksums`` are of is read; what is kept of another one is forgotten.

        What comes out has its checksums in ``checksums``, whether it has been read now or before, and may be changed.
        """
        identity = (checksums.weights.stamps(), dtype, shard)
        if identity != self._identity:
            self._kept.clear()
            self._identity = identity

        def keep(name: str, read: Callable[[], Any]) -> Any:
            if name not in self._kept:
                before = dict(checksums.sums)
                value = read()
                if not checksums.is_finite:  # is refused later; it must be each time
                    return value
                added = {key: total for key, total in checksums.sums.items() if before.get(key) != total}
                self._kept[name] = value, added
            value, added = self._kept[name]
            checksums.sums.update(added)
            return _copy(value)

        return keep


def _copy(value: Any) -> Any:
    """Of tensors, however nested."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return tuple(map(_copy, value))
