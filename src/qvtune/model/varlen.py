"""Attention within the documents of packed rows, without a mask: an attention implementation of transformers.

On a GPU it is torch's own flash kernel for sequences of different lengths; on a CPU one document is computed after
another. A mask over a whole row costs the products of all its tokens, also of those that it hides.

Shape suffixes: B rows, H heads, T tokens of a row, N = B*T, D head size.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

VARLEN = "varlen"  # its name among transformers' attention implementations
_HEAD_SIZE_MULTIPLE = 8  # of the kernel
_WITHOUT_KERNEL = ("cpu",)  # types of devices


def register_varlen(*, deterministic: bool) -> None:
    """Make ``attn_implementation=VARLEN`` known to transformers, which makes no mask for a name without a function.

    ``deterministic``: on a GPU backward gives the same bits at every call.
    """
    from transformers import AttentionInterface

    def attention(module: nn.Module, *tensors: Any, **options: Any) -> tuple[torch.Tensor, None]:
        return varlen_attention(module, *tensors, deterministic=deterministic, **options), None

    AttentionInterface.register(VARLEN, attention)


def varlen_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    deterministic: bool = True,
    **unused: Any,
) -> torch.Tensor:
    """Attention of the tokens of each document, causal where ``module`` is: [B, T, H, D].

    ``cu_seq_lens_q`` [documents + 1] int32: as ``Batch.cu_seqlens``. Keys and values may have fewer heads, each for
    several heads of the query. ``sliding_window``: how many tokens a token sees, itself included.
    """
    assert attention_mask is None and dropout == 0.0, "choose_attention does not choose it then"
    options: dict[str, Any] = {"scaling": scaling, "is_causal": module.is_causal, "window": sliding_window}
    if query_BHTD.device.type in _WITHOUT_KERNEL:
        return _one_by_one(query_BHTD, key_BHTD, value_BHTD, cu_seq_lens_q.tolist(), **options)
    output_NHD = _kernel(query_BHTD, key_BHTD, value_BHTD, cu_seq_lens_q, max_length_q, **options)
    if deterministic:
        _make_deterministic(output_NHD.grad_fn)
    output_BTHD: torch.Tensor = output_NHD[..., : query_BHTD.shape[-1]].unflatten(0, (len(query_BHTD), -1))
    return output_BTHD


def _kernel(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scaling: float,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    """[N, H, D], D filled up with zeros to what the kernel takes."""
    from torch.nn.attention.varlen import varlen_attn

    query_NHD, key_NHD, value_NHD = (
        pad(states.transpose(1, 2).flatten(0, 1), (0, -states.shape[-1] % _HEAD_SIZE_MULTIPLE))
        for states in (query_BHTD, key_BHTD, value_BHTD)
    )
    output_NHD = varlen_attn(
        query_NHD,
        key_NHD,
        value_NHD,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0 if is_causal else -1),
        enable_gqa=key_BHTD.shape[1] != query_BHTD.shape[1],
    )
    assert isinstance(output_NHD, torch.Tensor)  # a pair on request
    return output_NHD


def _one_by_one(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    borders: list[int],
    *,
    scaling: float,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    rows, heads, length, _ = query_BHTD.shape
    found = []
    for start, end in pairwise(borders):  # of the flattened tokens; no document crosses the end of a row
        row, first = divmod(start, length)
        place = slice(row, row + 1), slice(None), slice(first, first + end - start)
        mask_TT = _window_mask(end - start, window) if window is not None and end - start > window else None
        found.append(
            scaled_dot_product_attention(
                query_BHTD[place],
                key_BHTD[place],
                value_BHTD[place],
                attn_mask=mask_TT,
                is_causal=is_causal and mask_TT is None,
                scale=scaling,
                enable_gqa=key_BHTD.shape[1] != heads,
            ).transpose(1, 2)
        )
    return torch.cat(found, dim=1).view(rows, length, heads, -1)


def _make_deterministic(node: Any) -> None:
    """Let a node of the autograd graph, None in a forward without gradients, compute with deterministic kernels.

    For this node only: torch would refuse other operations of which it has no deterministic kernel.
    """
    if node is not None:
        node.register_prehook(lambda grad_outputs: torch.use_deterministic_algorithms(True))
        node.register_hook(lambda grad_inputs, grad_outputs: torch.use_deterministic_algorithms(False))


def _window_mask(length: int, window: int) -> torch.Tensor:
    """Whether a token (first dimension) sees another one, of causal attention."""
    return torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
