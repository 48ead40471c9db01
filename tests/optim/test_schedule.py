"""The schedule against closed forms and transformers' schedules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from qvtune.config.schema import ScheduleSection
from qvtune.optim.schedule import multiplier


def multipliers(max_steps: int, **settings: Any) -> list[float]:
    schedule = ScheduleSection(**settings)
    return [multiplier(step, max_steps, schedule) for step in range(max_steps)]


def multipliers_of(make: Callable[..., LambdaLR], num_steps: int, **settings: Any) -> list[float]:
    """What a scheduler of transformers multiplies a rate of 1 with."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_training_steps=num_steps, **settings)
    values = []
    for _ in range(num_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_closed_forms() -> None:
    assert multipliers(4, name="constant", warmup_ratio=0.0) == [1.0, 1.0, 1.0, 1.0]
    assert multipliers(4, name="linear", warmup_ratio=0.0) == [1.0, 0.75, 0.5, 0.25]
    assert multipliers(4, name="linear", warmup_ratio=0.0, min_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert multipliers(4, name="cosine", warmup_ratio=0.0) == pytest.approx([1.0, 0.85355339, 0.5, 0.14644661])
    assert multipliers(8, name="constant", warmup_ratio=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert multipliers(1, name="linear", warmup_ratio=0.03) == [1.0]


@pytest.mark.parametrize("warmup_steps", [0, 3, 10])
def test_linear_equals_transformers_after_its_warmup(warmup_steps: int) -> None:
    """During warm-up transformers is one step behind: its first step has rate 0 and moves nothing."""
    theirs = multipliers_of(get_linear_schedule_with_warmup, 30, num_warmup_steps=warmup_steps)
    ours = multipliers(30, name="linear", warmup_ratio=warmup_steps / 30)
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    assert ours[:warmup_steps] == pytest.approx(theirs[1 : warmup_steps + 1])


@pytest.mark.parametrize("min_ratio", [0.0, 0.1])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_cosine_equals_transformers_after_its_warmup(warmup_steps: int, min_ratio: float) -> None:
    make = get_cosine_with_min_lr_schedule_with_warmup
    theirs = multipliers_of(make, 30, num_warmup_steps=warmup_steps, min_lr_rate=min_ratio)
    ours = multipliers(30, name="cosine", warmup_ratio=warmup_steps / 30, min_ratio=min_ratio)
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])


@pytest.mark.parametrize("max_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_every_step_moves_and_none_exceeds_the_rate(name: str, warmup_ratio: float, max_steps: int) -> None:
    values = multipliers(max_steps, name=name, warmup_ratio=warmup_ratio)
    assert all(0.0 < value <= 1.0 for value in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_last_step_comes_close_to_min_ratio(name: str) -> None:
    last = multipliers(1000, name=name, min_ratio=0.1)[-1]
    assert 0.1 < last < 0.102


@pytest.mark.parametrize("step", [-1, 4])
def test_there_is_no_rate_outside_the_run(step: int) -> None:
    with pytest.raises(AssertionError):
        multiplier(step, 4, ScheduleSection())
