"""What the flash kernels allocate and compute, as an attention implementation of transformers without a kernel."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

FLASH = "qvtune_plan"  # its name among transformers' attention implementations, which read a meaning into "flash"
Shape = tuple[int, ...]


@torch.library.custom_op("qvtune_plan::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("there are only shapes to be had")


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output like the query, [B, heads, T, D], and the log of the softmax's sum, [B, heads, T] float32."""
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("qvtune_plan::attention_backward", mutates_args=())
def _backward_of_attention(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError("there are only shapes to be had")


@_backward_of_attention.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward_of_attention(grad, *ctx.saved_tensors[:3])
    return gradients


_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qvtune_plan.attention)
def _flop(query: Shape, *_: Shape, **__: Any) -> int:
    """Two matrix products over the half of the positions that a token sees."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * length * width


@register_flop_formula(torch.ops.qvtune_plan.attention_backward)
def _flop_of_backward(grad: Shape, *_: Shape, **__: Any) -> int:
    """Five products: the scores again, and four gradients."""
    return _flop(grad) * 5 // 2


def register_flash() -> None:
    """Make ``attn_implementation=FLASH`` known to transformers, with the flash kernels' mask (none)."""

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return _attention(query, key, value)[0].transpose(1, 2), None

    AttentionInterface.register(FLASH, attention)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
