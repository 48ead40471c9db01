"""Every task that a recipe can name is a module of qvtune.tasks with the whole interface."""

from typing import get_args

import pytest

from qvtune.config.schema import RunConfig
from qvtune.tasks import get_task
from qvtune.tasks.task import Task

NAMES = get_args(RunConfig.model_fields["task"].annotation)


def test_there_are_tasks() -> None:
    assert "causal_lm" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_finds_its_task(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name
    assert isinstance(task.metric, str) and isinstance(task.higher_is_better, bool)
