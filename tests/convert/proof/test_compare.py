"""Sums over parts of the vocabulary against torch on whole logits in float64."""

import pytest
import torch
from torch import Tensor, nn

from qvtune.convert.proof.compare import Difference, LogitSums, summary
from qvtune.convert.proof.proof import EXACT, ROUNDED, Limits, Proof

VOCABULARY = 50
Logits = list[Tensor]


@pytest.fixture
def logits() -> Logits:
    generator = torch.Generator().manual_seed(0)
    return [10 * torch.randn(length, VOCABULARY, generator=generator) for length in (100, 3)]


def noisy(logits: Logits, scale: float) -> Logits:
    generator = torch.Generator().manual_seed(1)
    return [one + scale * torch.randn(one.shape, generator=generator) for one in logits]


def sums_of(models: list[Logits], labels: Logits, pairs: list[tuple[int, int]], step: int) -> list[LogitSums]:
    sums = [LogitSums(len(models), one, pairs) for one in labels]
    for first in range(0, VOCABULARY, step):
        for text, one in enumerate(sums):
            one.add(first, [model[text][:, first : first + step] for model in models])
    return sums


def no_labels(logits: Logits) -> Logits:
    return [torch.full((len(one),), -100) for one in logits]


def compared(p: Logits, q: Logits, step: int = 20) -> Difference:
    return summary(sums_of([p, q], no_labels(p), [(0, 1)], step), {"pair": 0})["pair"]


def judged(difference: Difference, limits: Limits) -> bool:
    return Proof(**vars(difference), limits=limits).passed


def test_the_same_logits_pass(logits: Logits) -> None:
    difference = compared(logits, [one.clone() for one in logits])
    assert (difference.positions, difference.top1_agreement) == (103, 1.0)
    assert difference.max_abs_difference == difference.mean_abs_difference == 0
    assert abs(difference.mean_kl) < 1e-12
    assert judged(difference, EXACT)


@pytest.mark.parametrize("step", [1, 7, 20, VOCABULARY])
@pytest.mark.parametrize("scale", [1e-3, 3.0])
def test_differences_are_measured_over_all_positions(logits: Logits, step: int, scale: float) -> None:
    other = noisy(logits, scale)
    found = compared(logits, other, step)
    p, q = torch.cat(logits).double(), torch.cat(other).double()
    assert found.max_abs_difference == pytest.approx(float((p - q).abs().max()), rel=1e-12)
    assert found.mean_abs_difference == pytest.approx(float((p - q).abs().mean()), rel=1e-12)
    kl = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.mean_kl == pytest.approx(float(kl), rel=1e-6)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert judged(found, EXACT) == (scale == 1e-3 and found.max_abs_difference <= 1e-3)


def test_several_models_are_compared_in_pairs(logits: Logits) -> None:
    models = [logits, noisy(logits, 0.1), noisy(logits, 1.0)]
    found = summary(sums_of(models, no_labels(logits), [(0, 1), (2, 0)], 20), {"near": 0, "far": 1})
    assert found["near"] == compared(models[0], models[1])
    assert found["far"] == compared(models[2], models[0])


@pytest.mark.parametrize("step", [7, VOCABULARY])
def test_losses_are_cross_entropies_of_the_labels(logits: Logits, step: int) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = [torch.randint(0, VOCABULARY, (len(one),), generator=generator) for one in logits]
    labels[0][::3] = -100
    labels[0][1], labels[0][2] = 0, VOCABULARY - 1
    models = [logits, noisy(logits, 1.0)]
    found = torch.cat([one.losses() for one in sums_of(models, labels, [(0, 1)], step)], dim=1)
    for losses, model in zip(found, models, strict=True):
        expected = nn.functional.cross_entropy(torch.cat(model).double(), torch.cat(labels), reduction="sum")
        assert float(losses.sum()) == pytest.approx(float(expected), rel=1e-9)
    assert found.shape[1] == int((torch.cat(labels) != -100).sum())


@pytest.mark.parametrize("limits", [EXACT, ROUNDED])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_logit_that_is_not_finite_fails(logits: Logits, limits: Limits, value: float) -> None:
    broken = [one.clone() for one in logits]
    broken[0][8, 3] = value
    assert not judged(compared(logits, broken), limits)
    assert not judged(compared(broken, logits), limits)
    assert not judged(compared(broken, broken), limits)


def test_one_logit_that_is_off_fails_where_weights_are_exact(logits: Logits) -> None:
    other = [one.clone() for one in logits]
    other[0][8, int(logits[0][8].argmin())] += 0.01
    assert not judged(compared(logits, other), EXACT)
    assert judged(compared(logits, other), ROUNDED)
