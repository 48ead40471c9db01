"""The learning rate of each parameter group reaches its parameters."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import Results
from tests.support.lab import Lab

LR, BETA_1, BETA_2 = 1e-2, 0.9, 0.999
# Group -> its rate, and whether a parameter is in it.
GROUPS: dict[str, tuple[float, Callable[[str], bool]]] = {
    "q": (LR, lambda name: "q_proj" in name),
    "k": (0.5 * LR, lambda name: "k_proj" in name),
    "v*8": (8 * LR, lambda name: "layers.0." in name and "v_proj" in name),
    "v*4": (4 * LR, lambda name: "layers.1." in name and "v_proj" in name),
}


def _adapter(lab: Lab, step: int) -> dict[str, torch.Tensor]:
    return load_file(lab.run_dir("rates") / "checkpoints" / f"step-{step:08d}" / "adapter_model.safetensors")


def _largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], group: str, factor: str) -> float:
    names = [name for name in after if GROUPS[group][1](name) and f"lora_{factor}" in name]
    assert names
    return max(float((after[name] - before[name]).abs().max()) for name in names)


def test_the_log_names_each_group_with_its_rate(lab: Lab, two: Results) -> None:
    rates = {name: pytest.approx(rate, rel=1e-12) for name, (rate, _) in GROUPS.items()}
    assert [entry["lr"] for entry in lab.events("rates", "step")] == [rates, rates]


@pytest.mark.parametrize("group", GROUPS)
def test_the_first_step_moves_each_group_by_its_rate(lab: Lab, two: Results, group: str) -> None:
    """AdamW from zero moments moves a parameter by rate * g / (|g| + eps). B starts at 0, so A has no gradient yet."""
    after = _adapter(lab, 1)
    before = {name: torch.zeros_like(tensor) for name, tensor in after.items()}
    # eps is 1e-12 and the largest gradients are 1e-3 and more; what is left is float32's rounding of m / sqrt(v)
    assert _largest_change(before, after, group, "B") == pytest.approx(GROUPS[group][0], rel=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_the_second_step_moves_the_other_factor(lab: Lab, two: Results, group: str) -> None:
    """A's first gradient comes in step 2, where AdamW corrects for two steps: m' = g (1-b1)/(1-b1^2), v' likewise."""
    ratio = (1 - BETA_1) / (1 - BETA_1**2) / ((1 - BETA_2) / (1 - BETA_2**2)) ** 0.5
    change = _largest_change(_adapter(lab, 1), _adapter(lab, 2), group, "A")
    # a difference of two float32 numbers of up to 0.3, each rounded to 3e-8
    assert change == pytest.approx(GROUPS[group][0] * ratio, abs=6e-8)
