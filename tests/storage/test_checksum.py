"""Checksums that ranks compute together."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from qvtune.storage.checksum import add_checksums, partial_checksum

SIZE = 3 * 2**19 + 5  # bytes: three rows of weights and a word that is cut


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_it_can_be_split_at_any_byte(content: torch.Tensor, num_parts: int) -> None:
    cuts = np.random.default_rng(num_parts).choice(SIZE, num_parts - 1, replace=False)
    bounds = [0, *sorted(cuts.tolist()), SIZE]
    parts = [partial_checksum(content[a:b], a) for a, b in pairwise(bounds)]
    assert add_checksums(parts) == partial_checksum(content, 0) != 0


@pytest.mark.parametrize("position", [0, 7, 8, 2**19 - 1, 2**19, SIZE - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_every_flipped_bit_is_noticed(content: torch.Tensor, position: int, bit: int) -> None:
    damaged = content.clone()
    damaged[position] ^= 1 << bit
    assert partial_checksum(damaged, 0) != partial_checksum(content, 0)


def test_the_order_of_words_and_of_rows_counts(content: torch.Tensor) -> None:
    words, rows = content[:64].view(8, 8), content[: 2**20].view(2, 2**19)
    assert partial_checksum(words.flip(0).flatten(), 0) != partial_checksum(words.flatten(), 0)
    assert partial_checksum(rows.flip(0).flatten(), 0) != partial_checksum(rows.flatten(), 0)


def test_it_sees_bits_not_values() -> None:
    assert partial_checksum(torch.zeros(4), 0) != partial_checksum(-torch.zeros(4), 0)
    assert partial_checksum(torch.ones(6), 8) == partial_checksum(torch.ones(6).view(torch.uint8), 8)


def test_golden_value() -> None:
    """Fingerprints lie in checkpoints: the formula must never change."""
    assert f"{partial_checksum(torch.arange(100, dtype=torch.uint8), 0):016x}" == "83691198719dd360"
