"""torch's flash kernel for sequences of different lengths, which only GPUs have, as plain PyTorch on the CPU.

``torch.nn.attention.varlen.varlen_attn`` calls two operators of ATen. With these in their place its own code runs, and
what it is given can be looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from tests.support.varlen_attention import check_metadata


@dataclass
class Calls:
    """``deterministic``: of each backward, whether torch was asked for deterministic kernels."""

    num_forward: int = 0
    deterministic: list[bool] = field(default_factory=list)


@contextmanager
def flash_kernel_on_cpu() -> Iterator[Calls]:
    """Within the context the operators exist for tensors on the CPU."""
    calls = Calls()

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
        **unset: Any,
    ) -> tuple[torch.Tensor, ...]:
        calls.num_forward += 1
        _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
        assert dropout_p == 0.0 and not any(value is not None for value in unset.values())
        window = (window_size_left, 0 if is_causal else window_size_right)
        weights = _weights(query, key, cum_seq_q, scale, window)
        output = torch.einsum("hqk,khd->qhd", weights, _for_all_heads(value, query))
        empty = query.new_empty(0)
        return output, query.new_zeros(query.shape[1], query.shape[0]), empty, empty, empty

    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: torch.Tensor,
        unused: torch.Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[torch.Tensor, ...]:
        calls.deterministic.append(torch.are_deterministic_algorithms_enabled())
        _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
        window = (window_size_left, 0 if is_causal else window_size_right)
        weights = _weights(query, key, cum_seq_q, scale, window)
        grad_weights = torch.einsum("qhd,khd->hqk", grad_out, _for_all_heads(value, query))
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True)) * scale
        grad_query = torch.einsum("hqk,khd->qhd", grad_scores, _for_all_heads(key, query))
        grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query)
        grad_value = torch.einsum("hqk,qhd->khd", weights, grad_out)
        shared = (-1, query.shape[1] // key.shape[1])
        return grad_query, grad_key.unflatten(1, shared).sum(dim=2), grad_value.unflatten(1, shared).sum(dim=2)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    """What the kernel demands, or takes for granted."""
    check_metadata(cum_seq_q, max_q, len(query))
    assert torch.equal(cum_seq_q, cum_seq_k) and max_q == max_k
    for states in (query, key, value):
        assert states.dim() == 3 and states.stride(-1) == 1 and states.shape[-1] % 8 == 0


def _for_all_heads(states_NHD: torch.Tensor, query_NHD: torch.Tensor) -> torch.Tensor:
    return states_NHD.repeat_interleave(query_NHD.shape[1] // states_NHD.shape[1], dim=1)


def _weights(
    query_NHD: torch.Tensor, key_NHD: torch.Tensor, borders: torch.Tensor, scale: float, window: tuple[int, int]
) -> torch.Tensor:
    """[H, N, N]: of each token for all others; ``window``: how many it sees before and behind itself, -1 = all."""
    place = torch.arange(len(query_NHD))
    distance = place[None, :] - place[:, None]  # of a key, from the query
    before, behind = (limit if limit >= 0 else len(place) for limit in window)
    seen = (distance >= -before) & (distance <= behind)
    for start, end in pairwise(borders.tolist()):
        seen[start:end, :start] = seen[start:end, end:] = False
    scores = torch.einsum("qhd,khd->hqk", query_NHD, _for_all_heads(key_NHD, query_NHD)) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
