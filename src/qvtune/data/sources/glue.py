"""Where the rows of a task of GLUE are, and files that are recognised as its own."""

from collections.abc import Sequence
from pathlib import Path

from qvtune.config.data import SourceSection
from qvtune.config.glue import BY_NAME, GLUE, HUB_ID, is_official, official_file, task_in
from qvtune.data.sources.files import is_hub_id
from qvtune.data.sources.text_files import tsv_header
from qvtune.errors import UserError


def located(settings: SourceSection) -> SourceSection:
    """With the hub's id for ``glue/NAME``, and with the file of the split for a folder as GLUE publishes it.

    Raises UserError for a task that GLUE does not have, and for test rows, which have no labels.
    """
    path, folder = settings.path, Path(settings.path)
    by_name = path.startswith(BY_NAME) and is_hub_id(path)
    if by_name:
        _check_name(settings)
    if settings.glue is None:
        return settings
    if (by_name or is_official(folder)) and (settings.split or "").startswith("test"):
        raise UserError(
            f"{path}: GLUE does not publish the labels of its test rows, which `split: {settings.split}` asks for; "
            "leave it out"
        )
    if by_name:
        return settings.model_copy(update={"path": HUB_ID, "name": settings.glue})
    file = official_file(folder, settings.split)
    return settings if file is None else settings.model_copy(update={"path": str(file), "split": None})


def recognised(settings: SourceSection, files: Sequence[Path]) -> SourceSection:
    """TSV files with the task of GLUE that their columns tell, and the numbers of columns where there is no header."""
    if settings.columns or settings.format not in (None, "auto", "labelled"):
        return settings
    header = set(tsv_header(files[0]))
    found = [name for name, task in GLUE.items() if task.only_here and header >= task.only_here]
    name: str | None = settings.glue or next(iter(found), None)
    if name is None:
        return settings
    task = GLUE[name]
    has_header = any(column in header for layout in task.layouts for column in layout)
    columns = {} if has_header else dict(zip(("text", "label"), task.without_header, strict=False))
    return settings.model_copy(update={"glue": name, "columns": columns})


def _check_name(settings: SourceSection) -> None:
    name = settings.path.removeprefix(BY_NAME)
    if task_in(settings.path) is None:
        raise UserError(f"{settings.path}: no task of GLUE; there are {', '.join(GLUE)}")
    if settings.glue not in (None, name) or settings.name is not None:
        raise UserError(f"{settings.path} says which task of GLUE it is; leave `glue` and `name` out")
