"""The global order of training rows: a pure function of (seed, epoch), so no step needs those before it."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def permutation(num_rows: int, *entropy: int) -> NDArray[np.int64]:
    """Return a permutation of ``range(num_rows)``, read-only: the same for the same ``entropy``.

    Sorts random 64-bit keys rather than calling ``Generator.permutation``: NumPy promises stable streams across
    versions for bit generators only (NEP 19), and a resumed run must see the same order.
    """
    assert num_rows > 0
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num_rows)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=2)  # a step that crosses an epoch's end needs two
def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation of ``range(num_rows)`` that ``epoch`` visits."""
    return permutation(num_rows, seed, epoch)


def rows_of_step(step: int, global_batch_size: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Return the ``global_batch_size`` rows of optimizer step ``step`` (from 0), in order.

    The epochs' permutations follow each other without a gap; step s takes positions [s*B, (s+1)*B), which may lie in
    several epochs. Every row is visited once per epoch.
    """
    start, stop = step * global_batch_size, (step + 1) * global_batch_size
    pieces = []
    for epoch in range(start // num_rows, (stop - 1) // num_rows + 1):
        first = epoch * num_rows
        pieces.append(epoch_order(num_rows, seed, epoch)[max(start - first, 0) : stop - first])
    return np.concatenate(pieces)
