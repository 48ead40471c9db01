"""How far logits are apart, summed up while they arrive for a part of the vocabulary at a time.

Shape suffixes: T positions of a text, V entries of the vocabulary that have arrived together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvtune.data import IGNORE_INDEX

_CHUNK_POSITIONS = 64  # looked at together: bounds the float64 copies of their logits


@dataclass(frozen=True)
class Difference:
    """Of one model from another over all positions. Differences are of logits, KL(first || second) is in nats.

    ``largest_logit``: the largest absolute value, at any position, of the first model's highest logit.
    """

    positions: int
    max_abs_difference: float
    mean_abs_difference: float
    mean_kl: float
    top1_agreement: float
    largest_logit: float


class LogitSums:
    """Running sums over the vocabulary for one text and several models; float64, since they cancel.

    ``labels`` [T]: the token that each position has to predict, or -100. ``pairs`` are compared, by the models' index.
    """

    def __init__(self, num_models: int, labels: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        size = len(labels)
        self._labels, self._pairs, self._entries = labels, pairs, 0
        self._largest = torch.full((num_models, size), -torch.inf, dtype=torch.float64)
        self._choice = torch.zeros(num_models, size, dtype=torch.int64)
        self._exp = torch.zeros(num_models, size, dtype=torch.float64)  # sum of exp(logit - largest)
        self._at_label = torch.full((num_models, size), torch.nan, dtype=torch.float64)
        self._difference_max = torch.zeros(len(pairs), size, dtype=torch.float64)
        self._difference_sum = torch.zeros(len(pairs), size, dtype=torch.float64)
        self._weighted = torch.zeros(len(pairs), size, dtype=torch.float64)  # sum of exp(p - largest) * (p - q)

    def add(self, first: int, logits: Sequence[Tensor]) -> None:
        """Logits [T, V] of each model for the vocabulary's entries from ``first`` on."""
        for start in range(0, len(self._labels), _CHUNK_POSITIONS):
            at = slice(start, start + _CHUNK_POSITIONS)
            self._add(at, first, torch.stack([one[at] for one in logits]).double())
        self._entries += logits[0].shape[-1]

    def _add(self, at: slice, first: int, logits_MTV: Tensor) -> None:
        before = self._largest[:, at].clone()
        highest, choice = logits_MTV.max(-1)
        self._choice[:, at] = torch.where(highest > before, choice + first, self._choice[:, at])
        self._largest[:, at] = largest = torch.maximum(before, highest)
        rescale, exp_MTV = (before - largest).exp(), (logits_MTV - largest[..., None]).exp()
        self._exp[:, at] = self._exp[:, at] * rescale + exp_MTV.sum(-1)
        self._take_labels(at, first, logits_MTV)
        for index, (p, q) in enumerate(self._pairs):
            difference_TV = logits_MTV[p] - logits_MTV[q]
            self._weighted[index, at] = self._weighted[index, at] * rescale[p] + (exp_MTV[p] * difference_TV).sum(-1)
            difference_TV.abs_()
            self._difference_max[index, at] = torch.maximum(self._difference_max[index, at], difference_TV.amax(-1))
            self._difference_sum[index, at] += difference_TV.sum(-1)

    def _take_labels(self, at: slice, first: int, logits_MTV: Tensor) -> None:
        entry = self._labels[at] - first
        here = (entry >= 0) & (entry < logits_MTV.shape[-1])
        positions = here.nonzero().flatten()
        self._at_label[:, at.start + positions] = logits_MTV[:, positions, entry[positions]]

    def differences(self) -> Tensor:
        """For each pair and position: largest and mean difference, KL, whether the first choice is the same, and the
        first model's highest logit."""
        log_sums = self._largest + self._exp.log()
        rows = []
        for index, (p, q) in enumerate(self._pairs):
            kl = self._weighted[index] / self._exp[p] - log_sums[p] + log_sums[q]
            agrees = (self._choice[p] == self._choice[q]).double()
            mean = self._difference_sum[index] / self._entries
            rows.append(torch.stack([self._difference_max[index], mean, kl, agrees, self._largest[p]]))
        return torch.stack(rows)

    def choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each [models, T]: the first choice, its logit, and by how much the label's logit is lower (NaN: no label)."""
        return self._choice, self._largest, self._largest - self._at_label

    def losses(self) -> Tensor:
        """[models, label positions]: -log p(label), nats."""
        at_label = self._labels != IGNORE_INDEX
        return (self._largest + self._exp.log() - self._at_label)[:, at_label]


def summary(sums: Sequence[LogitSums], pairs: Mapping[str, int]) -> dict[str, Difference]:
    """Over all texts; ``pairs``: a name for each pair's index. What is not finite stays so."""
    measured = torch.cat([one.differences() for one in sums], dim=-1)  # [pairs, 5, positions]
    result = {}
    for name, index in pairs.items():
        largest, mean, kl, agrees, highest = measured[index]
        result[name] = Difference(
            positions=len(agrees),
            max_abs_difference=float(largest.max()),
            mean_abs_difference=float(mean.mean()),
            mean_kl=float(kl.mean()),
            top1_agreement=float(agrees.mean()),
            largest_logit=float(highest.abs().max()),
        )
    return result
