"""Turns validation errors of pydantic into sentences for the user who wrote the setting."""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

# What a value must be, for errors that pydantic describes in terms of Python.
_MUST_BE = {
    "string_type": "must be text (put it in quotes if it looks like a number, a date or yes/no)",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number, written in digits",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "dict_type": "must be a mapping `{key: value}`",
    "model_type": "must be a section, `{key: value}`",
    "tuple_type": "must be a list `[a, b]`",
}


def dotted(path: Sequence[str | int]) -> str:
    """``("adapter", "projections", 1)`` -> ``adapter.projections[1]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def closest(word: object, allowed: Collection[str]) -> list[str]:
    """The allowed word most similar to ``word``, as a list of one; empty if none is similar."""
    return difflib.get_close_matches(str(word), allowed, n=1)


def suggestion(candidates: Sequence[str], allowed: Collection[str]) -> str:
    """``did you mean ...?``, or everything that is allowed if there is no candidate."""
    if candidates:
        return f"did you mean {' or '.join(f'`{candidate}`' for candidate in candidates)}?"
    return f"allowed: {', '.join(allowed)}"


def describe(error: ErrorDetails, model: type[BaseModel], path: Sequence[str | int] = ()) -> str:
    """One sentence for ``error``: what was found, what is allowed. ``path`` leads to ``model``, which was validated."""
    location = error["loc"]
    name = dotted((*path, *(part for part in location if part != "[key]")))
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"`{name}` is not a setting; {_suggest_key(model, location, path)}"
        case "missing":
            return f"`{name}` is not set, and it has no default"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            nearest = closest(error["input"], choices)
            hint = f"; {suggestion(nearest, choices)}" if nearest else ""
            is_key = location[-1] == "[key]"
            found = f"{dotted((*path, *location[:-2]))}` has the key" if is_key else f"{name}` is"
            return f"`{found} {error['input']!r}; allowed: {', '.join(choices)}{hint}"
        case "string_type" if "[key]" in location:
            return f"`{dotted((*path, *location[:-2]))}` has the key {error['input']!r}; a key must be text"
        case kind:
            must_be = _MUST_BE.get(kind) or error["msg"].replace("Input should", "must").removeprefix("Value error, ")
            return f"`{name}` is {error['input']!r}; it {must_be}" if name else must_be  # of the whole configuration


def _suggest_key(model: type[BaseModel], location: Sequence[str | int], path: Sequence[str | int]) -> str:
    """Suggest keys of the same name in other sections and the closest one in this; else similar ones elsewhere."""
    *parents, unknown = (str(part) for part in location)
    settings = list(_settings(model))
    beside = {names[-1]: names for names in settings if list(names[:-1]) == parents}
    elsewhere = [names for names in settings if list(names[:-1]) != parents]
    found = [names for names in elsewhere if names[-1] == unknown]
    found += [beside[key] for key in closest(unknown, beside)]
    if not found:
        near = closest(unknown, {names[-1] for names in elsewhere})
        found = [names for names in elsewhere if names[-1] in near]
    return suggestion([dotted((*path, *names)) for names in found], list(beside))


def _settings(model: type[BaseModel], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Path of each setting and section of ``model``, at every depth."""
    for name, field in model.model_fields.items():
        path = (*parents, field.alias or name)
        yield path
        section = section_type(field.annotation)
        if section is not None:
            yield from _settings(section, path)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The model in ``annotation`` (``Model`` or ``Model | None``), if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
