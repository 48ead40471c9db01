"""Packing with less padding than best-fit decreasing leaves, in more time."""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence

from qvtune.data.order import permutation

_LAST_DOCUMENTS = 3  # of a row, on average: so many are chosen


def pack_dense(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put whole documents into rows of at most ``max_length`` tokens; each row lists document indices.

    Best-fit decreasing begins with rows of long documents only, whose gaps no document fits, and ends with rows of
    short ones. Here a row takes documents in a shuffled order (a fixed one), so that at any time all lengths are left,
    until about three more fit: then it takes the pair that fills it best, as often as anything fits. Deterministic.
    O(n * distinct lengths / documents per row).
    """
    pool = _Pool(lengths)
    rows = []
    chosen_from = _LAST_DOCUMENTS * sum(lengths) / max(1, len(lengths))
    while pool.lengths:
        row: list[int] = []
        space = max_length
        while space > chosen_from and (document := pool.draw(space)) is not None:
            row.append(document)
            space -= lengths[document]
        while chosen := pool.best(space):
            row += map(pool.take, chosen)
            space -= sum(chosen)
        assert row, f"a document has more than the {max_length} tokens of a row"
        rows.append(row)
    return rows


class _Pool:
    """Documents that are in no row yet. ``lengths``: the different ones that they have, ascending."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._length_of = lengths
        order: list[int] = permutation(len(lengths), 0).tolist() if lengths else []
        self._by_length: dict[int, deque[int]] = {}
        for document in order:
            self._by_length.setdefault(lengths[document], deque()).append(document)
        self.lengths = sorted(self._by_length)
        self._order, self._next, self._taken = order, 0, bytearray(len(lengths))

    def draw(self, space: int) -> int | None:
        """The next document of the shuffled order; None if it does not fit, or there is none."""
        while self._next < len(self._order) and self._taken[self._order[self._next]]:
            self._next += 1
        if self._next == len(self._order) or self._length_of[self._order[self._next]] > space:
            return None
        document = self._order[self._next]
        first = self._by_length[self._length_of[document]].popleft()
        assert first == document
        self._remove(document)
        return document

    def take(self, length: int) -> int:
        """A document of this length, of all the last in the shuffled order."""
        document = self._by_length[length].pop()
        self._remove(document)
        return document

    def _remove(self, document: int) -> None:
        self._taken[document] = True
        length = self._length_of[document]
        if not self._by_length[length]:
            del self._by_length[length], self.lengths[bisect_left(self.lengths, length)]

    def best(self, space: int) -> tuple[int, ...]:
        """The one or two lengths of documents that fill ``space`` best; none if nothing fits."""
        longest = bisect_right(self.lengths, space) - 1
        if longest < 0:
            return ()
        best: tuple[int, ...] = (self.lengths[longest],)
        filled, shortest = self.lengths[longest], 0
        while shortest <= longest and filled < space:
            low, high = self.lengths[shortest], self.lengths[longest]
            if low + high > space:
                longest -= 1
                continue
            if low + high > filled and (shortest < longest or len(self._by_length[low]) > 1):
                best, filled = (high, low), low + high
            shortest += 1
        return best
