"""Proof that a merged folder computes what base and adapter compute: the logits of both on the same texts.

The adapted view evaluates the adapter beside the base's weights, as PEFT does, with none of the merge's code; the
merged view reads what was written. Each has the weights of its own dtype, but all compute in float32: with bfloat16
arithmetic even a model and its float32 twin agree on 97 % of the first choices only (SmolLM2-135M), which would hide a
wrong merge. One layer of one view is in memory at a time, so a proof runs wherever a merge does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qvtune.convert.proof.compare import Difference, LogitSums, summary
from qvtune.convert.proof.layers import LayeredModel
from qvtune.convert.proof.texts import Text
from qvtune.convert.proof.views import ModelViews
from qvtune.errors import UserError
from qvtune.model.skeleton import without_weights


@dataclass(frozen=True)
class Limits:
    """How far apart the two models may be and still count as equal."""

    top1_agreement: float
    max_abs_difference: float | None
    mean_kl: float


# The same weights: only the order of additions differs, which moves logits by 1e-5 to 1e-4.
EXACT = Limits(top1_agreement=1.0, max_abs_difference=1e-3, mean_kl=1e-5)
# Weights rounded to 16 bits. SmolLM2-135M in bfloat16: 99.6 %, KL 1.1e-4, single logits off by 0.3. The same with a
# scaling that is wrong by a tenth: 97.8 %, KL 4.4e-3. Few positions make the agreement grainy, hence 98 %.
ROUNDED = Limits(top1_agreement=0.98, max_abs_difference=None, mean_kl=1e-3)


@dataclass(frozen=True)
class Proof(Difference):
    """How far the merged model is from base + adapter, and how far it may be."""

    limits: Limits

    @property
    def passed(self) -> bool:
        """Whether all limits are kept; a NaN keeps none."""
        bound = self.limits.max_abs_difference
        return (
            self.top1_agreement >= self.limits.top1_agreement
            and (bound is None or self.max_abs_difference <= bound)
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
    """Run all views on all texts and compare them."""
    present = {field.name: view for field in fields(views) if (view := getattr(views, field.name)) is not None}
    if views.reference is views.adapted:
        del present["reference"]
    at = {name: index for index, name in enumerate(present)}
    pairs = {"proof": (at.get("reference", at["adapted"]), at["merged"])}
    if "other" in at:
        pairs |= {"chosen": (at["adapted"], at["merged"]), "other": (at["adapted"], at["other"])}
    sums = [LogitSums(len(at), torch.tensor(text.targets), list(pairs.values())) for text in texts]
    for index, first, logits in model.logits(list(present.values()), [text.ids for text in texts]):
        sums[index].add(first, logits)
    found = summary(sums, {name: index for index, name in enumerate(pairs)})
    proof = Proof(**asdict(found.pop("proof")), limits=limits)
    return Result(proof, found, _losses(torch.cat([one.losses() for one in sums], dim=1), list(at)))


def _losses(losses: torch.Tensor, order: Sequence[str]) -> Losses | None:
    if not losses.shape[1]:
        return None
    mean = dict(zip(order, losses.mean(dim=1).tolist(), strict=True))
    return Losses(losses.shape[1], mean["before"], mean["adapted"], mean["merged"])


def empty_model(folder: Path, changes: Mapping[str, Any], trust_remote_code: bool) -> LayeredModel:
    """The architecture of a folder's config.json with ``changes``, without weights.

    Raises UserError where a proof cannot be computed for it.
    """
    return LayeredModel(skeleton(folder, changes, trust_remote_code))


def skeleton(folder: Path, changes: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The transformers model of a folder's config.json with ``changes``, its parameters on the meta device.

    Raises UserError for a config.json that transformers does not know.
    """
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    config.update(changes)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    name = (config.architectures or ["ForCausalLM"])[0]
    kind = next(
        (
            kind
            for kind in ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
            if name.endswith(kind)
        ),
        "ForCausalLM",
    )
    auto_class = getattr(transformers, f"AutoModel{kind}")
    return without_weights(auto_class, config, torch.float32, trust_remote_code=trust_remote_code)
