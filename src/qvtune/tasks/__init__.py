"""What is trained for: everything that differs between tasks, and nothing else. Each module here is one task."""

from importlib import import_module
from typing import TYPE_CHECKING

from qvtune.config.schema import ClassificationSection

if TYPE_CHECKING:  # tasks import torch; a configuration is checked without it
    from qvtune.tasks.task import Task


def get_task(name: str, classification: ClassificationSection | None = None) -> "Task":
    """The task that ``task: NAME`` of a recipe means: what ``make_task`` of the module of that name gives."""
    task: Task = import_module(f"{__name__}.{name}").make_task(classification or ClassificationSection())
    return task
