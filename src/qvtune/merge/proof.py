"""Proof that a merged folder computes what base and adapter compute: the logits of both on the same texts.

Neither side uses the code of the merge: the adapted model comes from training's loader and from PEFT, the merged one
from transformers. Each has the weights of its own dtype, but both compute in float32: with bfloat16 arithmetic even a
model and its float32 twin agree on 97 % of the first choices only (SmolLM2-135M), which would hide a wrong merge.

Shape suffixes: T positions, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qvtune.base.loader import load_whole
from qvtune.base.nf4 import NF4Linear
from qvtune.config.load import load_config
from qvtune.config.schema import DataSection, ModelSection
from qvtune.data.dataset import build_token_rows
from qvtune.data.demo import demo_files
from qvtune.errors import UserError
from qvtune.paths import cache_dir

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Übersetze ins Englische: Der schnelle braune Fuchs springt über den faulen Hund.",
    "17 * 23 = 391, so 391 / 17 = 23. What is 24 * 24 - 1?",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]} Describe this person in one sentence.',
    "Once upon a time, in a village at the foot of a mountain, there lived an old clockmaker who never slept.",
)
_DEFAULT_ROWS = 8
_CHUNK_POSITIONS = 64  # compared at a time: bounds the fp32 copies of their logits


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
class Proof:
    """How far merged is from adapted, over all positions of all texts. Differences are of logits, KL is in nats."""

    positions: int
    max_abs_difference: float
    mean_abs_difference: float
    mean_kl: float
    top1_agreement: float
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


def load_adapted(base: Path, model: ModelSection, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    """Base and adapter with the weights that training in ``dtype`` has, computing in float32."""
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(load_whole(base, model, dtype), checkpoint, torch_device="cpu")
    for name, module in list(adapted.named_modules()):
        if isinstance(module, NF4Linear):  # its bits must not be converted
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(module.dequantize(), requires_grad=False), module.bias
            adapted.set_submodule(name, plain)
    return adapted.float().eval()


def load_merged(folder: Path, model: ModelSection) -> nn.Module:
    """The merged folder as anyone loads it, its weights in its own dtype, computing in float32."""
    from transformers import AutoModelForCausalLM

    merged: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", trust_remote_code=model.trust_remote_code
    )
    return merged.float().eval()


@torch.no_grad()
def compare(adapted: nn.Module, merged: nn.Module, texts: Iterable[list[int]], limits: Limits) -> Proof:
    """Run both models on every text, given as token ids. Logits that are not finite do not pass."""
    measured = [
        _measure(*chunks) for ids in texts for chunks in zip(_logits(adapted, ids), _logits(merged, ids), strict=True)
    ]
    largest, difference, kl, agrees = torch.cat(measured, dim=1).double()
    return Proof(
        positions=len(agrees),
        max_abs_difference=float(largest.max()),
        mean_abs_difference=float(difference.mean()),
        mean_kl=float(kl.mean()),
        top1_agreement=float(agrees.mean()),
        limits=limits,
    )


def _logits(model: nn.Module, ids: list[int]) -> Sequence[torch.Tensor]:
    logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.split(logits_TV, _CHUNK_POSITIONS)


def _measure(adapted_TV: torch.Tensor, merged_TV: torch.Tensor) -> torch.Tensor:
    """For each position: largest and mean difference, KL(adapted || merged), whether the first choice is the same."""
    adapted_TV, merged_TV = adapted_TV.float(), merged_TV.float()
    difference_TV = (adapted_TV - merged_TV).abs()
    log_p_TV, log_q_TV = adapted_TV.log_softmax(-1), merged_TV.log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    agrees_T = (adapted_TV.argmax(-1) == merged_TV.argmax(-1)).float()
    return torch.stack([difference_TV.amax(-1), difference_TV.mean(-1), kl_T, agrees_T])


def fixed_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of ``PROMPTS``, as a user's turn where the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        return [tokenizer(text)["input_ids"] for text in PROMPTS]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS
    ]


def evaluation_rows(tokenizer: Any, checkpoint: Path, num_rows: int | None) -> list[list[int]]:
    """Token ids of the first documents that the run was evaluated on.

    ``num_rows`` None: 8, or none where the checkpoint is no longer in its run folder or the data is gone.
    Raises UserError where rows are asked for and cannot be had.
    """
    config_file = checkpoint.parents[1] / "config.yaml"
    data = load_config(config_file).data if config_file.is_file() else None
    file = _evaluation_file(data)
    if data is None or file is None:
        if num_rows:
            raise UserError(
                f"--proof-rows {num_rows}: needs {config_file} with a data.eval that is still there; leave the option "
                "out to compare on the fixed prompts alone"
            )
        return []
    rows = build_token_rows(file, "data.eval", data, tokenizer, cache_dir() / "tokens")
    documents = (
        document.tolist()
        for row in map(rows.__getitem__, range(len(rows)))
        for document in np.split(row.input_ids, np.cumsum(row.document_lengths)[:-1])
    )
    return list(islice(documents, _DEFAULT_ROWS if num_rows is None else num_rows))


def _evaluation_file(data: DataSection | None) -> Path | None:
    """``data.eval`` where it is set and there; relative to the current folder, as training reads it."""
    if data is None or data.eval is None:
        return None
    file = demo_files(cache_dir())[1] if data.eval == "demo" else Path(data.eval)
    return file if file.is_file() else None
