"""Theorem 1 of arXiv 2410.02247: a bound on the generalization error of fine-tuning, for a configuration and its data.

Let the loss be R-sub-Gaussian (a loss within a range of 1 has R = 1/2), N the number of training rows, q the bits of a
parameter. For LoRA of rank r on layers whose W_q, W_k and W_v have one shape d_in x d_out the paper has

    error(QV)  <= sqrt(4 R^2 / N * q * r * sum over layers of (d_in + d_out))
    error(QKV) <= sqrt(6 R^2 / N * q * r * sum over layers of (d_in + d_out))

Both are sqrt(2 R^2 * q * P / N) with P trained parameters, the form that also holds where the matrices have several
shapes (grouped-query attention), for a head, for DoRA, and for the matrices themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qvtune.config.schema import RunConfig
from qvtune.model.adapters import HEAD
from qvtune.study.counts import Counts, count_parameters

R = 0.5  # of a loss within a range of 1
QV, QKV = ("q", "v"), ("q", "k", "v")


@dataclass(frozen=True)
class Bound:
    """Of the difference of expected and training loss, in units of the range of the loss: 1 and more says nothing.

    ``paper``: the paper's form; None where it is not defined: other methods, shapes or projections.
    """

    projections: tuple[str, ...]
    parameters: int
    head: int
    adapters_only: float
    with_head: float
    paper: float | None


def bounds(run: RunConfig, num_rows: int, bits: int) -> list[Bound]:
    """Of the run's projections, of q and v, and of q, k and v, all else as configured; each once."""
    found = []
    for projections in dict.fromkeys((run.adapter.projections, QV, QKV)):
        counts = count_parameters(run, projections)
        head = counts.groups[HEAD]
        found.append(
            Bound(
                projections,
                counts.adapters,
                head,
                by_parameters(counts.adapters, num_rows, bits),
                by_parameters(counts.adapters + head, num_rows, bits),
                _paper_form(run, projections, counts, num_rows, bits),
            )
        )
    return found


def by_parameters(parameters: int, num_rows: int, bits: int) -> float:
    """sqrt(2 R^2 * q * P / N)."""
    return math.sqrt(2 * R**2 * bits * parameters / num_rows)


def by_shapes(factor: int, rank: int, shapes: Sequence[tuple[int, int]], num_rows: int, bits: int) -> float:
    """sqrt(factor * R^2 / N * q * r * sum of (d_in + d_out)); ``factor`` is 4 for q and v, 6 for q, k and v."""
    return math.sqrt(factor * R**2 / num_rows * bits * rank * sum(map(sum, shapes)))


def _paper_form(run: RunConfig, projections: tuple[str, ...], counts: Counts, num_rows: int, bits: int) -> float | None:
    factor = {frozenset(QV): 4, frozenset(QKV): 6}.get(frozenset(projections))
    q, k, v = (counts.shapes[letter] for letter in QKV)
    if factor is None or run.adapter.method not in ("lora", "rslora") or not q == k == v:
        return None
    return by_shapes(factor, run.adapter.rank, q, num_rows, bits)
