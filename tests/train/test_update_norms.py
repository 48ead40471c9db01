"""Norms of updates from their factors, against the updates themselves."""

import math

import pytest
import torch

from qvtune.checkpoint.state import TrainedState
from qvtune.config.adapter import AdapterSection
from qvtune.train.update_norms import update_norms

MODULE = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"


def factors(num_layers: int, rank: int) -> TrainedState:
    generator = torch.Generator().manual_seed(0)
    state: TrainedState = {}
    for layer in range(num_layers):
        for letter, outputs in (("q", 40), ("v", 12)):
            for factor, shape in (("A", (rank, 30)), ("B", (outputs, rank))):
                value = torch.randn(shape, generator=generator) * (1 + 3 * (letter == "v"))
                state[MODULE.format(layer, letter, factor)] = {"value": value}
    return state


@pytest.mark.parametrize(("method", "scale"), [("lora", 8 / 4), ("rslora", 8 / math.sqrt(4)), ("dora", 8 / 4)])
def test_norms_are_those_of_the_products(method: str, scale: float) -> None:
    state = factors(num_layers=11, rank=4)
    found = update_norms(state, AdapterSection(method=method, rank=4, alpha=8.0))
    for letter, norms in found.items():
        pairs = [[state[MODULE.format(layer, letter, factor)]["value"] for factor in "BA"] for layer in range(11)]
        assert norms == pytest.approx([float(torch.linalg.norm(scale * b @ a)) for b, a in pairs], rel=1e-5)
    assert list(found) == ["q", "v"]


def test_factors_whose_product_is_zero_have_no_norm() -> None:
    """As with adapter.init=orthogonal at the start, where rounding must not give the root of a negative number."""
    q, _ = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    state: TrainedState = {
        MODULE.format(0, "q", "A"): {"value": torch.stack([q[:, 0], q[:, 0]])},
        MODULE.format(0, "q", "B"): {"value": torch.stack([q[:, 1], -q[:, 1]], dim=1)},
    }
    assert update_norms(state, AdapterSection(rank=2)) == {"q": [pytest.approx(0.0, abs=1e-6)]}


def test_without_factors_there_is_nothing_to_tell() -> None:
    state: TrainedState = {"model.layers.0.self_attn.q_proj.weight": {"value": torch.ones(3, 3)}}
    assert update_norms(state, AdapterSection(method="full")) == {}
