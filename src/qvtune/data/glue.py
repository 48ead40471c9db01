"""Rows of GLUE -> text, pair and name of the class."""

from collections.abc import Mapping
from typing import Any

from qvtune.config.glue import GLUE
from qvtune.data.rows import MISSING_COLUMN, BadRowError

_NO_LABEL = ("", "-1", "-1.0")  # of the test rows on the hub


def glue_row(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A row of task ``name`` with the columns of format ``labelled``.

    A class is a name, as in some official files, or its number, as in the others and on the hub. Raises BadRowError.
    """
    layouts = GLUE[name].layouts
    columns = next((one for one in layouts if value.keys() >= set(one)), None)
    if columns is None:
        raise BadRowError(_missing(name, value), MISSING_COLUMN)
    *texts, label = (value[column] for column in columns)
    return {**dict(zip(("text", "text_pair"), texts, strict=False)), "label": _class_name(name, label)}


def _class_name(name: str, label: Any) -> Any:
    names = GLUE[name].labels
    if str(label) in _NO_LABEL:
        raise BadRowError("it has no label: GLUE does not publish those of its test rows", "no label")
    if not names or label in names:
        return label
    numbered = {str(number): one for number, one in enumerate(names)}
    if str(label) not in numbered:
        known = ", ".join(f"{number} = {one}" for number, one in numbered.items())
        raise BadRowError(f"the label {label!r} is none of GLUE's {name}: {known}", "no label of GLUE")
    return numbered[str(label)]


def _missing(name: str, value: Mapping[str, Any]) -> str:
    layouts = GLUE[name].layouts
    if any(value.keys() >= set(one[:-1]) for one in layouts):
        return f"it has no label, as in the test files of GLUE's {name}: give those for training and evaluation"
    wanted = ", or ".join(" and ".join(f"`{column}`" for column in one) for one in layouts)
    found = sorted(map(str, value))
    return f"the columns are {found}, but GLUE's {name} has {wanted}; `columns` says where they have other names"
