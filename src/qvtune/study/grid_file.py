"""GRID.yaml as it is written, checked for what can be said without its recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError

from qvtune.config.adapter import Projection
from qvtune.config.load import read_yaml
from qvtune.config.problems import closest, describe, suggestion
from qvtune.config.section import Section
from qvtune.errors import UserError

PROJECTIONS: tuple[str, ...] = get_args(Projection)
FACTORS = ("task", "projections", "method", "rank", "parameters", "ratio", "learning_rate", "seed")


class GridFile(Section):
    """Keys of GRID.yaml; see ``qvtune.study.cell``."""

    recipe: str
    run_dir: str | None = None
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cells: tuple[dict[str, Any], ...] = ()
    factors: dict[str, tuple[Any, ...]] = Field(default_factory=dict)


def read_grid_file(path: Path) -> GridFile:
    """Read and check the file; ``projections`` are then tuples in their usual order. Raises UserError with all problems
    of the file itself."""
    tree, _, problems = read_yaml(path)
    return check_grid_file(tree, str(path), problems)


def check_grid_file(tree: Mapping[str, Any], name: str, problems: Sequence[str] = ()) -> GridFile:
    """As ``read_grid_file``, of what has been read; ``name`` stands before each problem but those found before."""
    found = list(problems)
    try:
        file = GridFile.model_validate(tree)
    except ValidationError as error:
        raise UserError([*found, *(f"{name}: {describe(one, GridFile)}" for one in error.errors())]) from error
    found += [f"{name}: {problem}" for problem in _problems(file)]
    if found:
        raise UserError(found)
    return file.model_copy(
        update={
            "cells": tuple({key: _normal(key, value) for key, value in cell.items()} for cell in file.cells),
            "factors": {key: tuple(_normal(key, value) for value in values) for key, values in file.factors.items()},
        }
    )


def _problems(file: GridFile) -> list[str]:
    found = []
    if not (file.cells or file.factors or file.tasks):
        found.append("no cells: give `factors`, `cells` or `tasks`")
    of_cells = dict.fromkeys(key for cell in file.cells for key in cell)
    for key in dict.fromkeys([*file.factors, *of_cells]):
        if key not in FACTORS and "." not in key:
            allowed = suggestion(closest(key, FACTORS), FACTORS)
            found.append(f"`{key}` is no factor; {allowed} Settings are written `section.key`")
        if key in file.factors and key in of_cells:
            found.append(f"`{key}` is in `factors` and in `cells`; give it in one of them")
    for name, keys in (("factors", file.factors), *((f"cells[{n}]", cell) for n, cell in enumerate(file.cells))):
        both: Mapping[str, Any] = {**file.factors, **keys}
        if "rank" in both and "parameters" in both:
            found.append(f"`{name}` has a rank and a number of parameters, which decides the rank; give one of them")
    for key, values in file.factors.items():
        if not values or len({repr(_normal(key, value)) for value in values}) < len(values):
            found.append(f"`factors.{key}` is {list(values)}; it must have at least one value, and each once")
    return found + _value_problems(file)


def _value_problems(file: GridFile) -> list[str]:
    found = []
    for key, value in _values(file):
        if key == "task" and value not in file.tasks:
            found.append(f"task {value!r} is none of `tasks` ({', '.join(file.tasks) or 'there are none'})")
        if key == "projections" and _projections(value) is None:
            found.append(f"projections {value!r}; write e.g. qv, or [q, v, gate], of {', '.join(PROJECTIONS)}")
        if key == "parameters" and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            found.append(f"parameters {value!r}; give a whole number > 0: that of all trained adapter parameters")
    for name, settings in file.tasks.items():
        found += [f"`tasks.{name}.{key}`: write settings as `section.key`" for key in settings if not _is_key(key)]
    return list(dict.fromkeys(found))


def _is_key(key: str) -> bool:
    return "." in key or key in ("task", "deepspeed")


def _values(file: GridFile) -> list[tuple[str, Any]]:
    of_cells = [item for cell in file.cells for item in cell.items()]
    return [*((key, value) for key, values in file.factors.items() for value in values), *of_cells]


def _normal(key: str, value: Any) -> Any:
    """Projections as a tuple in their usual order; numbers as numbers (YAML reads 1e-4 as text)."""
    if key == "projections":
        return _projections(value) or value
    if key in ("ratio", "learning_rate") and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _projections(value: Any) -> tuple[str, ...] | None:
    """``qv``, ``q+gate`` or a list -> names in their usual order; None where it is none of these."""
    if isinstance(value, str):
        names: Sequence[Any] = [value] if value in PROJECTIONS else value.split("+") if "+" in value else list(value)
    elif isinstance(value, list | tuple):
        names = value
    else:
        return None
    if not names or len(set(map(str, names))) < len(names) or not set(map(str, names)) <= set(PROJECTIONS):
        return None
    return tuple(sorted(map(str, names), key=PROJECTIONS.index))
