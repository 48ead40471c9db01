"""The schedule as a pure function: a step's learning rate is the group's initial rate times ``multiplier(step)``."""

import math

from qvtune.config.schema import ScheduleSection


def multiplier(step: int, max_steps: int, schedule: ScheduleSection) -> float:
    """Factor for optimizer step ``step``, counted from 0.

    Linear warm-up over ``ceil(warmup_ratio * max_steps)`` steps, of which the first already moves (1/n of the rate);
    then constant, or along a line or half a cosine towards ``min_ratio``, which the step after the last would have:
    with ``min_ratio: 0`` the last step still moves.
    """
    assert 0 <= step < max_steps, (step, max_steps)
    warmup_steps = math.ceil(schedule.warmup_ratio * max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    remaining = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * remaining
