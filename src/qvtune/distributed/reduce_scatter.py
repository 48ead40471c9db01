"""Averaging ZeRO-3's gradients over the ranks with less Python than DeepSpeed's own way.

DeepSpeed cuts each gradient into the parts of all ranks, one by one: 2,048 pieces for the four factors of a layer on
512 GPUs. Here each gradient is copied once, as a matrix with a row for each rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch


def use_short_reduce_scatter() -> None:
    """Let ZeRO-3's optimizers in this process average gradients by ``reduce_scatter``."""
    from deepspeed.runtime.zero import stage3

    stage3.reduce_scatter_coalesced = reduce_scatter


@torch.no_grad()
def reduce_scatter(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """This rank's parts of the means of tensors over the ranks of ``group``, in one collective.

    The tensors are contiguous and of one dtype; the parts are 1-D, on the last ranks shorter or empty. Takes the place
    of DeepSpeed's ``reduce_scatter_coalesced`` and has its results, bit for bit.
    """
    import deepspeed.comm as dist  # which can log what it sends (comms_logger)

    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    flat = [tensor.view(-1) for tensor in tensors]
    sizes = [math.ceil(one.numel() / num_ranks) for one in flat]
    if len(flat) == 1 and flat[0].numel() % num_ranks == 0:
        buffer = flat[0].view(num_ranks, -1)  # as it is, without a copy
    else:
        buffer = flat[0].new_empty(num_ranks, sum(sizes))
        for one, parts in zip(flat, buffer.split(sizes, dim=1), strict=True):
            num_full, rest = divmod(one.numel(), parts.shape[1])
            parts[:num_full] = one[: one.numel() - rest].view(num_full, -1)
            if rest:
                parts[num_full, :rest] = one[-rest:]
    buffer.div_(num_ranks)
    dist.reduce_scatter_fn(buffer[rank], buffer.view(-1), group=group)
    own = buffer[rank].split(sizes)
    return [part[: max(0, one.numel() - rank * size)] for part, one, size in zip(own, flat, sizes, strict=True)]
