"""Averaging gradients against DeepSpeed's own function, on every rank of several sizes of a group."""

from typing import Any

import deepspeed.comm
import pytest
import torch
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from deepspeed.runtime.zero import stage3

from qvtune.distributed.reduce_scatter import reduce_scatter, use_short_reduce_scatter

# One that need not be copied; fewer elements than ranks; no multiple of the ranks; several.
SHAPES: list[list[tuple[int, ...]]] = [[(6, 4)], [(1,)], [(7, 3)], [(2, 5), (3,), (4, 6), (1, 1)]]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_deepspeeds(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], num_ranks: int, dtype: torch.dtype
) -> None:
    """The collective adds a number to each element that depends on its place, as other ranks' gradients would."""
    sent: list[torch.Tensor] = []

    def collective(own: torch.Tensor, whole: torch.Tensor, **_: Any) -> None:
        sent.append(whole.clone())
        own += torch.arange(own.numel(), dtype=dtype)

    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda group=None: num_ranks)
    monkeypatch.setattr(deepspeed.comm, "reduce_scatter_fn", collective)
    generator = torch.Generator().manual_seed(num_ranks)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for rank in range(num_ranks):
        monkeypatch.setattr(deepspeed.comm, "get_rank", lambda group=None, rank=rank: rank)
        expected = reduce_scatter_coalesced([tensor.clone() for tensor in tensors])
        found = reduce_scatter([tensor.clone() for tensor in tensors])
        assert [one.shape for one in found] == [one.shape for one in expected]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(sent) == 2 * num_ranks
    assert len({one.shape for one in sent}) == 1


def test_zero_3_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage3, "reduce_scatter_coalesced", stage3.reduce_scatter_coalesced)  # as it was afterwards
    use_short_reduce_scatter()
    assert stage3.reduce_scatter_coalesced is reduce_scatter
