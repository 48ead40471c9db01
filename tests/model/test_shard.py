"""Which elements a rank stores."""

import pytest
import torch

from qvtune.model.shard import Shard, Whole, resident_bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("total", [0, 1, 2, 7, 64, 331])
def test_the_spans_of_all_ranks_are_the_whole_in_order(num_ranks: int, total: int) -> None:
    elements = torch.arange(total)
    pieces = [elements[slice(*shard.span(total))] for shard in Shard(0, num_ranks).peers()]
    assert torch.equal(torch.cat(pieces), elements)


@pytest.mark.parametrize(("total", "num_ranks", "expected"), [(10, 3, 4), (9, 3, 3), (1, 5, 1), (0, 2, 0), (7, 1, 7)])
def test_every_rank_stores_the_same_number_padding_included(total: int, num_ranks: int, expected: int) -> None:
    shards = Shard(0, num_ranks).peers()
    assert {shard.numel(total) for shard in shards} == {expected}
    assert all(end - start <= expected for start, end in (shard.span(total) for shard in shards))


def test_whole_keeps_the_values_in_their_shape_frozen() -> None:
    parameter = Whole(torch.device("cpu")).parameter((2, 3), torch.arange(6.0))
    assert parameter.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert not parameter.requires_grad
    assert resident_bytes(parameter) == 24
