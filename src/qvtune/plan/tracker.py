"""What tensor operations allocate, gather and compute, counted while they run, on real tensors and on fake ones.

torch's own ``MemTracker`` registers gradient hooks on every parameter, which frozen ones refuse, and does not know of
partitioned parameters; its ``RuntimeEstimator`` asks the GPU that it runs on for its speed. This mode counts storages
and operations as they do, the storages under names that the caller sets.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from qvtune.distributed.fake_ranks import gathered_bytes

Bytes = Counter[str]  # cause -> bytes
_NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}  # and views


@dataclass
class Tracked:
    """What a ``Tracker`` has counted.

    Attributes:
        current: bytes of the storages that are alive, by the cause under which each was allocated.
        peaks: phase -> ``current`` at the moment of the phase at which its sum was largest.
        gathered: number of ranks of a group -> bytes that all-gathers in such groups have put on this rank.
        operations: (FLOP, bytes read and written) -> number of operations that need them.
    """

    current: Bytes = field(default_factory=Counter)
    peaks: dict[str, Bytes] = field(default_factory=dict)
    gathered: Counter[int] = field(default_factory=Counter)
    operations: Counter[tuple[int, int]] = field(default_factory=Counter)


class Tracker(TorchDispatchMode):
    """Counts, as a context, what is done in it; ``tracked`` is the result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracked = Tracked()
        self._cause = self._phase = "start"
        self._known = WeakIdKeyDictionary()  # storages

    @contextmanager
    def under(self, cause: str) -> Iterator[None]:
        """Within the context what is allocated has this cause."""
        before, self._cause = self._cause, cause
        try:
            yield
        finally:
            self._cause = before

    def enter(self, phase: str) -> None:
        """From now on peaks are those of this phase."""
        self._phase = phase
        self._note_peak()

    def restart(self) -> None:
        """Forget everything but what is alive."""
        self.tracked = Tracked(current=self.tracked.current)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor)
        if func.namespace == "c10d":
            self.tracked.gathered.update(gathered_bytes(func, args))
        elif not (func.is_view or func.namespace == "prim" or func._overloadpacket.__name__ in _NO_WORK):
            count_flop = flop_registry.get(func._overloadpacket)
            flop = count_flop(*args, **kwargs, out_val=result) if count_flop is not None else 0
            num_bytes = sum(tensor.nbytes for tensor in _tensors((args, kwargs, result)))
            self.tracked.operations[flop, num_bytes] += 1
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or not storage.nbytes():
            return
        cause, size, current = self._cause, storage.nbytes(), self.tracked.current
        self._known[storage] = True
        finalize(storage, lambda: current.update({cause: -size})).atexit = False
        current[cause] += size
        self._note_peak()

    def _note_peak(self) -> None:
        peaks = self.tracked.peaks
        if self._phase not in peaks or self.tracked.current.total() > peaks[self._phase].total():
            peaks[self._phase] = self.tracked.current.copy()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
