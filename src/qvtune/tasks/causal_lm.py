"""Causal language modelling: predict the next token of the answers.

Shape suffixes: B rows, T positions, N label positions of the batch, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qvtune.config.data import LossOn
from qvtune.config.schema import ClassificationSection
from qvtune.data.batch import Batch, collate
from qvtune.data.mixture import Rows
from qvtune.data.packing import PackedRow
from qvtune.data.rows import BadRowError, Row
from qvtune.data.tokenize import Document, tokenize_rows
from qvtune.distributed import process_group
from qvtune.model.adapters import transformers_model
from qvtune.model.families import FAMILIES
from qvtune.model.linear import ROWS, linear
from qvtune.tasks.metrics import Documents, in_order
from qvtune.tasks.task import Task

_LARGEST_EXPONENT = 709.0  # of e, in float64
_CHUNK_LOGITS = 5 * 2**20  # logits in memory at a time: 20 MiB in fp32, as much again while they are normalized
# Type of device -> label positions at a time, at least. Fewer leave a GPU idle; these are 0.5 GB with 128k tokens.
MIN_CHUNK_ROWS = {"cpu": ROWS, "cuda": 1024, "meta": 1024}


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Label positions whose logits are in memory at a time."""
    return max(MIN_CHUNK_ROWS[device_type], _CHUNK_LOGITS // vocab_size // ROWS * ROWS)


class CausalLM(Task):
    """Cross entropy of the label tokens; the best checkpoint is the one with the lowest evaluation loss."""

    name = cache_key = "causal_lm"
    truncates = False
    needs_labels = False
    peft_task_type = "CAUSAL_LM"
    metric = "loss"
    higher_is_better = False

    def labels_of(self, rows: Iterable[Row]) -> tuple[str, ...]:
        """None: the labels are tokens."""
        return ()

    def head(self, seed: int, rows: Rows | None = None) -> None:
        """None: a language model has its head."""

    def model_problems(self, config: Any, max_length: int) -> list[str]:
        """An encoder's tokens attend to those after them, so there is nothing to predict."""
        if not FAMILIES[config.model_type].is_encoder:
            return []
        decoders = [name for name, family in FAMILIES.items() if not family.is_encoder]
        return [
            f"task: {self.name} predicts the next token, and model_type {config.model_type!r} is an encoder, whose "
            f"tokens attend to those after them; give a decoder ({', '.join(decoders)}) in model.name_or_path"
        ]

    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: LossOn, max_length: int
    ) -> list[list[Document] | BadRowError]:
        """Labels on the assistant's turns, on the completion, or on every token."""
        return tokenize_rows(rows, tokenizer, loss_on)

    def label_of(self, row: PackedRow, document: int) -> None:
        """None: tokens have labels."""

    def collate(self, rows: Sequence[PackedRow], pad_token_id: int) -> Batch:
        """Labels shifted by one: position t predicts the token at t + 1."""
        return collate(rows, pad_token_id)

    def objective(self, model: nn.Module) -> nn.Module:
        """Decoder, chunked output head and cross entropy."""
        return CausalLMObjective(model)

    def evaluate(self, engine: Any, batches: Iterable[Batch], documents: Documents | None = None) -> dict[str, float]:
        """``loss`` (mean cross entropy, nats per label token), ``token_accuracy`` (share of the label tokens that have
        the largest logit) and ``perplexity`` (the exponential of the loss), over all label tokens."""
        num_labels = 0
        own: list[tuple[NDArray[Any], ...]] = []
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=engine.device)
        for batch in batches:
            num_labels += batch.num_label_tokens
            losses_N = None if documents is None else torch.empty(batch.num_label_tokens, device=engine.device)
            loss_sum += engine(batch.to(engine.device), num_correct=num_correct, losses_N=losses_N)
            if losses_N is not None:
                own.append(_summed_by_document(batch, losses_N))
        if documents is not None:
            documents["loss"], documents["tokens"] = in_order(own)
        sums = process_group.sum_over_ranks(loss_sum.item(), num_labels, num_correct.item())
        loss, accuracy = sums[0] / sums[1], sums[2] / sums[1]
        return {"loss": loss, "token_accuracy": accuracy, "perplexity": math.exp(min(loss, _LARGEST_EXPONENT))}


def _summed_by_document(batch: Batch, losses_N: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sum (float64) and number of the losses of each document that has some."""
    document = np.searchsorted(batch.cu_seqlens.numpy(), batch.label_positions.numpy(), side="right")
    tokens = np.bincount(document)
    sums = np.bincount(document, weights=losses_N.cpu().numpy())
    return sums[tokens > 0], tokens[tokens > 0]


TASK = CausalLM()


def make_task(settings: ClassificationSection) -> Task:
    """The task, which has no settings."""
    return TASK


class CausalLMObjective(nn.Module):
    """Decoder, output head and loss around what ``add_adapters`` returns; build it after the base is filled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal_lm = transformers_model(model)
        self._decoder = [causal_lm.get_decoder()]  # in a list: registered once, under ``model``
        self.head = FrozenHeadLoss(causal_lm.get_output_embeddings())

    def forward(
        self,
        batch: Batch,
        num_correct: torch.Tensor | None = None,
        losses_N: torch.Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> torch.Tensor:
        """Sum of ``-log p(label)`` over the label positions, fp32 scalar, nats.

        To ``num_correct``, an int64 scalar, the number of labels with the largest logit is added. ``losses_N`` gets the
        terms of the sum, in the order of the label positions. With ``return_hidden_states`` it returns those before the
        output head instead, [B, T, D].

        Isolation of packed documents: sdpa and eager build a block-diagonal mask from positions that restart, but only
        as long as no attention mask is given; the flash kernels and whatever follows their interface take cu_seqlens.
        """
        hidden_BTD: torch.Tensor = self._decoder[0](
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state
        if return_hidden_states:
            return hidden_BTD
        labels_N = batch.labels.flatten().index_select(0, batch.label_positions)
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.label_positions)
        return head_cross_entropy(self.head, hidden_ND, labels_N, num_correct, losses_N)


def head_cross_entropy(
    head: "FrozenHeadLoss",
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    num_correct: torch.Tensor | None = None,
    losses_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of ``-log p(label)`` as an fp32 scalar, 0 where N is 0, with its gradient.

    The module itself is outside of autograd, so that ZeRO-3 does not gather its weight a second time for backward.
    """
    loss, grad_ND = head(hidden_ND.detach(), labels_N, num_correct, losses_N, with_gradient=hidden_ND.requires_grad)
    if grad_ND is None:
        return loss  # type: ignore[no-any-return]
    return _WithGradient.apply(hidden_ND, loss, grad_ND)  # type: ignore[no-any-return,no-untyped-call]


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to the hidden states is known already."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, loss: torch.Tensor, grad_ND: torch.Tensor) -> torch.Tensor:
        ctx.grad_ND = grad_ND
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        grad_ND, ctx.grad_ND = ctx.grad_ND, None
        return (grad_ND * grad_outputs[0]).to(grad_ND.dtype), None, None


class FrozenHeadLoss(nn.Module):
    """Summed cross entropy through an output head that is not trained."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        assert not any(parameter.requires_grad for parameter in head.parameters())
        # Parameters of this module, so that ZeRO-3 gathers them once for all chunks.
        self.weight, self.bias = head.weight, head.bias

    @torch.no_grad()
    def forward(
        self,
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        num_correct: torch.Tensor | None = None,
        losses_N: torch.Tensor | None = None,
        *,
        with_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """fp32 scalar, 0 where N is 0; and, on demand, its gradient [N, D]. Logits live for a chunk of N only."""
        total = torch.zeros((), device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if with_gradient else None
        rows = chunk_rows(self.weight.shape[0], hidden_ND.device.type)
        for start in range(0, len(labels_N), rows):
            chunk, label_N1 = slice(start, start + rows), labels_N[start : start + rows, None]
            log_probs_NV = linear(hidden_ND[chunk], self.weight, self.bias).float()
            log_probs_NV -= log_probs_NV.logsumexp(dim=-1, keepdim=True)
            at_label_N1 = log_probs_NV.gather(1, label_N1)
            total -= at_label_N1.sum()
            if losses_N is not None:
                losses_N[chunk] = -at_label_N1[:, 0]
            if num_correct is not None:
                num_correct += (log_probs_NV.argmax(dim=-1, keepdim=True) == label_N1).sum()
            if grad_ND is not None:  # d loss / d logits = softmax - one-hot
                grad_logits_NV = log_probs_NV.exp_()
                grad_logits_NV.scatter_add_(1, label_N1, torch.full_like(label_N1, -1, dtype=torch.float32))
                grad_ND[chunk] = linear(grad_logits_NV.to(self.weight.dtype), self.weight.T)
        return total, grad_ND
