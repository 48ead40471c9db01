"""Rows of several sources: one after another, and in the order in which a run visits them."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qvtune.data.order import permutation, rows_of_step
from qvtune.data.packing import PackedRow
from qvtune.data.statistics import combined


class Rows(Protocol):
    """Packed rows, as ``TokenRows`` has them."""

    statistics: dict[str, Any]
    num_tokens: NDArray[np.int32]
    num_label_tokens: NDArray[np.int32]

    @property
    def num_documents(self) -> int:
        """How many documents were tokenized, also those of which no row has a part."""

    def __len__(self) -> int:
        """How many rows."""

    def __getitem__(self, index: int) -> PackedRow:
        """One row."""

    def documents(self, index: int) -> NDArray[np.int64]:
        """Of each document of a row its number among all documents of the source, in the source's order."""


class JoinedRows:
    """The rows of several sources, one source after another; attributes as those of ``TokenRows``.

    Attributes:
        sources: the rows of each source.
    """

    def __init__(self, sources: Sequence[Rows], max_length: int) -> None:
        assert sources
        self.sources = sources
        self.statistics = combined([one.statistics for one in sources], max_length)
        self.num_tokens, self.num_label_tokens = (
            np.concatenate([getattr(one, name) for one in sources]) for name in ("num_tokens", "num_label_tokens")
        )
        self._ends: list[int] = np.cumsum([len(one) for one in sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> PackedRow:
        source, row = self._place(index)
        return self.sources[source][row]

    def documents(self, index: int) -> NDArray[np.int64]:
        """As ``Rows``; the numbers go on from source to source."""
        source, row = self._place(index)
        return self.sources[source].documents(row) + sum(one.num_documents for one in self.sources[:source])

    @property
    def num_documents(self) -> int:
        """Of all sources."""
        return sum(one.num_documents for one in self.sources)

    def _place(self, index: int) -> tuple[int, int]:
        """Source of a row, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect_right(self._ends, index)
        return source, int(index) - (self._ends[source - 1] if source else 0)


class RowOrder:
    """Which row a run visits at which position: a pure function of the settings and the position.

    Without weights all sources are shuffled together, and each row is visited once per epoch. With weights each source
    is shuffled by itself and visited in epochs of its own; the sources take turns so that of any number of first rows
    each has its share, rounded. An epoch of the run has as many rows as all sources together.
    """

    def __init__(self, num_rows: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        """``num_rows`` of each source; ``weights``: its share, relative to the sum; ``seed`` of the permutations."""
        self._num_rows, self._seed = tuple(num_rows), seed
        self._weights = whole_numbers(weights) if weights and len(weights) > 1 else None
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> its epoch that was needed last

    def of_step(self, step: int, global_batch_size: int) -> NDArray[np.int64]:
        """The rows of optimizer step ``step`` (from 0) in order, numbered through all sources."""
        if self._weights is None:
            return rows_of_step(step, global_batch_size, sum(self._num_rows), self._seed)
        found, visits = [], self._visits(step * global_batch_size)
        for position in range(step * global_batch_size, (step + 1) * global_batch_size):
            after = self._visits(position + 1)
            source = next(index for index, visit in enumerate(visits) if after[index] > visit)
            found.append(self._row(source, visits[source]))
            visits = after
        return np.array(found, np.int64)

    def passes(self, num_positions: int) -> list[float]:
        """How often each source is visited as a whole within the first ``num_positions`` rows."""
        if self._weights is None:
            return [num_positions / sum(self._num_rows)] * len(self._num_rows)
        return [visits / size for visits, size in zip(self._visits(num_positions), self._num_rows, strict=True)]

    def _visits(self, num_positions: int) -> list[int]:
        """How many of the first ``num_positions`` rows each source gives.

        The first source gives the integer nearest to its share, the others divide what is left in the same way. So each
        position adds one to one of them, and none is ever far from its share.
        """
        assert self._weights is not None
        left, rest, found = num_positions, sum(self._weights), []
        for weight in self._weights:
            found.append((2 * left * weight + rest) // (2 * rest))
            left, rest = left - found[-1], rest - weight
        return found

    def _row(self, source: int, visit: int) -> int:
        epoch, place = divmod(visit, self._num_rows[source])
        if self._orders.get(source, (None,))[0] != epoch:
            self._orders[source] = epoch, permutation(self._num_rows[source], self._seed, epoch, source)
        return sum(self._num_rows[:source]) + int(self._orders[source][1][place])


def whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """In the same ratios, exactly as they are written in decimals."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * common) for fraction in fractions)
