"""The contract of the flash kernels' variable-length form, as plain PyTorch.

``flash_attn_varlen_func`` knows nothing of rows, masks or positions: it sees all tokens of the batch in one line and
the offsets at which documents begin. An attention function that computes just that shows whether they are right.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

VARLEN = "varlen_reference"  # its name among transformers' attention implementations


class VarlenAttention:
    """Attention within each document of ``cu_seqlens``, causal where the module is; checks what it is given, counts
    its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        cu_seq_lens_q: torch.Tensor,
        cu_seq_lens_k: torch.Tensor,
        max_length_q: int,
        max_length_k: int,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Queries [B, heads, T, D], keys and values [B, kv_heads, T, D] -> [B, T, heads, D]."""
        self.num_calls += 1
        rows, heads, length, _ = query.shape
        assert attention_mask is None and dropout == 0.0
        check_metadata(cu_seq_lens_q, max_length_q, rows * length)
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k) and max_length_q == max_length_k
        groups = heads // key.shape[1]  # query heads that share a key
        query_HND, key_HND, value_HND = (
            states.transpose(0, 1).flatten(1, 2) for states in (query, key, value)
        )  # N = B*T, all rows in one line
        key_HND, value_HND = (states.repeat_interleave(groups, dim=0) for states in (key_HND, value_HND))
        bounds = cu_seq_lens_q.tolist()
        documents = [
            _attend(
                *(states[:, start:end] for states in (query_HND, key_HND, value_HND)),
                scaling,
                module.is_causal,
                sliding_window,
            )
            for start, end in pairwise(bounds)
        ]
        output_HND = torch.cat(documents, dim=1)
        return output_HND.unflatten(1, (rows, length)).permute(1, 2, 0, 3).contiguous(), None


def check_metadata(cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int) -> None:
    """What the kernels take for granted: with anything else they read where they should not, and say nothing."""
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous()
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == num_tokens
    lengths = cu_seqlens.diff()
    assert (lengths > 0).all()
    assert type(max_seqlen) is int and max_seqlen == lengths.max()


def _attend(
    query_HSD: torch.Tensor,
    key_HSD: torch.Tensor,
    value_HSD: torch.Tensor,
    scaling: float,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    length = query_HSD.shape[1]
    hidden_SS = torch.ones(length, length, dtype=torch.bool, device=query_HSD.device).triu(1) & causal
    if window is not None:  # a token sees this many, itself included
        hidden_SS |= torch.ones_like(hidden_SS).tril(-window)
    scores_HSS = (query_HSD @ key_HSD.transpose(1, 2)).float() * scaling
    weights_HSS = scores_HSS.masked_fill(hidden_SS, float("-inf")).softmax(dim=-1)
    return weights_HSS.to(value_HSD.dtype) @ value_HSD


def register_varlen() -> VarlenAttention:
    """Make ``attn_implementation=VARLEN`` known to transformers, with the flash kernels' mask (none)."""
    attention = VarlenAttention()
    AttentionInterface.register(VARLEN, attention)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)
    return attention
