"""Proof that a merged folder computes what base and adapter compute: the logits of both on the same texts.

The adapted view evaluates the adapter beside the base's weights, as PEFT does, with none of the merge's code; the
merged view reads what was written. Each has the weights of its own dtype, but all compute in float32: with bfloat16
arithmetic even a model and its float32 twin agree on 97 % of the first choices only (SmolLM2-135M), which would hide a
wrong merge. One layer of one view is in memory at a time, so a proof runs wherever a merge does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from qvtune.convert.proof.compare import Difference, LogitSums, summary
from qvtune.convert.proof.layers import LayeredModel
from qvtune.convert.proof.texts import Text
from qvtune.convert.proof.views import ModelViews


@dataclass(frozen=True)
class Limits:
    """How far apart the two models may be and still count as equal.

    ``max_relative_difference``: the largest difference, as a share of ``largest_logit``.
    """

    top1_agreement: float
    max_abs_difference: float | None
    mean_kl: float
    max_relative_difference: float | None = None


# The same weights: only the order of additions differs, which moves logits by 1e-5 to 1e-4.
EXACT = Limits(top1_agreement=1.0, max_abs_difference=1e-3, mean_kl=1e-5)
# Weights rounded to 16 bits. SmolLM2-135M in bfloat16: 99.6 %, KL 1.1e-4, single logits off by 0.3. The same with a
# scaling that is wrong by a tenth: 97.8 %, KL 4.4e-3. Few positions make the agreement grainy, hence 98 %.
ROUNDED = Limits(top1_agreement=0.98, max_abs_difference=None, mean_kl=1e-3)
# A single score has no distribution, so that KL and first choice say nothing; its scale is that of the labels.
EXACT_SCORES = Limits(1.0, max_abs_difference=None, mean_kl=1e-5, max_relative_difference=1e-5)
ROUNDED_SCORES = Limits(1.0, max_abs_difference=None, mean_kl=1e-3, max_relative_difference=2e-2)


@dataclass(frozen=True)
class Proof(Difference):
    """How far the merged model is from base + adapter, and how far it may be."""

    limits: Limits

    @property
    def passed(self) -> bool:
        """Whether all limits are kept; a NaN keeps none."""
        bound, relative = self.limits.max_abs_difference, self.limits.max_relative_difference
        return (
            self.top1_agreement >= self.limits.top1_agreement
            and (bound is None or self.max_abs_difference <= bound)
            and (relative is None or self.max_abs_difference <= relative * self.largest_logit)
            and self.mean_kl <= self.limits.mean_kl
        )


@dataclass(frozen=True)
class Losses:
    """On the evaluation rows of the proof, nats per label token: base alone, with adapter as trained, merged."""

    label_tokens: int
    before: float
    adapted: float
    merged: float


@dataclass(frozen=True)
class Result:
    """``proof`` decides; ``from_training`` says how far this merge, and one with the other choice, is from what was
    trained (empty where there is no choice); ``losses`` are there where the texts have labels."""

    proof: Proof
    from_training: dict[str, Difference]
    losses: Losses | None


def prove(model: LayeredModel, views: ModelViews, texts: Sequence[Text], limits: Limits) -> Result:
    """Run the models on the texts and compare their logits; ``views.before`` only where a text has labels."""
    present = {"adapted": views.adapted, "merged": views.merged}
    if views.reference is not views.adapted:
        present["reference"] = views.reference
    if views.other is not None:
        present["other"] = views.other
    at = {name: index for index, name in enumerate([*present, "before"])}
    pairs = {"proof": (at.get("reference", at["adapted"]), at["merged"])}
    if views.other is not None:
        pairs |= {"chosen": (at["adapted"], at["merged"]), "other": (at["adapted"], at["other"])}
    labelled = [index for index, text in enumerate(texts) if text.has_labels]
    sums = [
        LogitSums(len(present) + text.has_labels, torch.tensor(text.targets), list(pairs.values())) for text in texts
    ]
    run = [*present.values(), views.before] if labelled else list(present.values())
    for index, first, logits in model.logits(run, [text.ids for text in texts], {at["before"]: labelled}):
        sums[index].add(first, logits)
    found = summary(sums, {name: index for index, name in enumerate(pairs)})
    proof = Proof(**asdict(found.pop("proof")), limits=limits)
    return Result(proof, found, _losses([sums[index].losses() for index in labelled], list(at)))


def _losses(found: Sequence[torch.Tensor], order: Sequence[str]) -> Losses | None:
    """Means over the label positions of all texts; each of ``found`` is [models, label positions]."""
    if not found:
        return None
    losses = torch.cat(list(found), dim=1)
    mean = dict(zip(order, losses.mean(dim=1).tolist(), strict=True))
    return Losses(losses.shape[1], mean["before"], mean["adapted"], mean["merged"])
