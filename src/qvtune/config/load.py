"""A run's configuration: a YAML file, then ``section.key=value`` overrides, then the schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qvtune.config.data import SOURCE, TAGS, SourceSection
from qvtune.config.problems import describe, section_type
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError

# Path of a setting -> where it was written: "recipe.yaml, line 12" or "command line, `train.seed=1`".
Places = dict[tuple[str, ...], str]

_SECTIONS = [name for name, field in RunConfig.model_fields.items() if section_type(field.annotation)]
# Prefixes of settings that are mappings with free keys, e.g. "optimizer.lr_multipliers.".
_MAPPINGS = [
    f"{name}.{key}."
    for name in _SECTIONS
    for key, field in (section_type(RunConfig.model_fields[name].annotation) or RunConfig).model_fields.items()
    if get_origin(field.annotation) is dict
]


def load_config(path: Path, overrides: Sequence[str] = (), written_in: str = "command line") -> RunConfig:
    """Read the YAML file ``path``, apply ``overrides`` of the form ``section.key=value``, and validate.

    A value is read as YAML, so ``train.max_steps=null`` clears a setting; a later override wins. The key ends at the
    first ``=``. One entry of a mapping is set by ``optimizer.lr_multipliers.PATTERN=NUMBER``: there the key ends at the
    *last* ``=`` and everything before it is the pattern, dots and ``=`` included. A replaced entry keeps its place in
    the order of patterns, a new one comes last. ``written_in``: where messages say that the overrides were found.

    Raises:
        UserError: with every problem of the file, the overrides and the values at once.
    """
    tree, places, problems = read_yaml(path)
    for override in overrides:
        problems += _apply(override, tree, places, written_in)
    for name in _SECTIONS:
        if tree.get(name) is None:  # a heading without settings: all defaults
            tree[name] = {}
    problems += _length_problems(tree["train"], places)
    config = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        details = [detail for detail in error.errors() if detail["type"] != "one_length"]  # reported above, with places
        problems += [f"{_place(_untagged(detail['loc']), places)}: {_describe(detail)}" for detail in details]
    if problems:
        raise UserError(problems)
    assert config is not None
    return config


def dump_config(config: RunConfig) -> str:
    """``config`` as YAML with every default written out; ``load_config`` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def split_override(override: str) -> tuple[str, str]:
    """``section.key=value`` -> its key and its value; the value is empty where there is no ``=``."""
    _, name, _, text = _split(override)
    return name, text


def _split(override: str) -> tuple[str | None, str, str, str]:
    """The mapping that the key is an entry of (``optimizer.lr_multipliers.``), the key, ``=`` and the value."""
    mapping = next((prefix for prefix in _MAPPINGS if override.startswith(prefix)), None)
    return (mapping, *(override.rpartition("=") if mapping else override.partition("=")))


def read_yaml(path: Path) -> tuple[dict[str, Any], Places, list[str]]:
    """The mapping in ``path``, the place of each key, and a problem for each duplicate key.

    Raises UserError for a file that is none, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except OSError as error:
        beside = sorted(file.name for file in path.parent.glob("*.y*ml"))
        there = f"; files there: {', '.join(beside)}" if beside else ""
        raise UserError(f"{path}: the configuration cannot be read ({error.strerror}){there}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: e.g. the date 2024-99-99
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {_kind(tree)}; it must hold sections, e.g. `train: {{max_steps: 100}}`")
    places: Places = {(): str(path)}
    assert isinstance(node, yaml.MappingNode)
    return tree, places, _record_keys(node, (), path, places)


def _record_keys(node: yaml.MappingNode, parents: tuple[str, ...], path: Path, places: Places) -> list[str]:
    """Record the line of each key in ``places``; return a problem for each duplicate key."""
    problems: list[str] = []
    for key_node, value_node in node.value:
        key = (*parents, str(key_node.value))
        place = f"{path}, line {key_node.start_mark.line + 1}"
        if key in places:
            problems.append(f"{place}: `{'.'.join(key)}` is set a second time (first: {places[key]}); keep one")
        places[key] = place
        problems += _record_below(value_node, key, path, places)
    return problems


def _record_below(node: yaml.Node, key: tuple[str, ...], path: Path, places: Places) -> list[str]:
    """The same for a value: a mapping, or a list in which there may be some."""
    if isinstance(node, yaml.MappingNode):
        return _record_keys(node, key, path, places)
    problems: list[str] = []
    for index, item in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
        place = (*key, str(index))
        places[place] = f"{path}, line {item.start_mark.line + 1}"
        problems += _record_below(item, place, path, places)
    return problems


def _apply(override: str, tree: dict[str, Any], places: Places, written_in: str) -> list[str]:
    """Apply one ``section.key=value`` to ``tree`` and record it in ``places``; return its problems."""
    place = f"{written_in}, `{override}`"
    mapping, name, equals, text = _split(override)
    key = tuple([*mapping.rstrip(".").split("."), name.removeprefix(mapping)] if mapping else name.split("."))
    if not equals or not all(key):
        return [f"{place}: not of the form section.key=value, e.g. `train.max_steps=100`"]
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        return [f"{place}: the value is not YAML ({reason}); put text in quotes, e.g. {name}='\"...\"'"]
    section = tree
    for depth, part in enumerate(key[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            return [f"{place}: `{'.'.join(key[:depth])}` is {section!r} and has no keys of its own"]
    section[key[-1]] = value
    for stale in [other for other in places if other[: len(key)] == key]:
        del places[stale]
    places[key] = place
    return []


def _length_problems(train: Any, places: Places) -> list[str]:
    """A problem with its remedy unless exactly one of max_steps and epochs is set."""
    if not isinstance(train, dict):
        return []  # reported by the schema
    given = [key for key in ("max_steps", "epochs") if train.get(key) is not None]
    if len(given) == 1:
        return []
    if not given:
        train_place = _place(("train",), places)
        return [f"{train_place}: neither `train.max_steps` nor `train.epochs` is set; give one, e.g. `train.epochs=1`"]
    where = {key: _place(("train", key), places) for key in given}
    # The command line is what the user wants now, so suggest clearing the setting in the file.
    clear = next((key for key in given if not where[key].startswith("command line")), given[0])
    settings = " and ".join(f"`train.{key}` = {train[key]!r} ({where[key]})" for key in given)
    return [f"{settings} are both set; only one may be: clear the other, e.g. with `train.{clear}=null`"]


def _untagged(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """Without what pydantic says of the kinds of sources."""
    return tuple(part for part in location if part not in TAGS)


def _describe(detail: ErrorDetails) -> str:
    """Keys of a source are compared with those of a source, wherever it stands."""
    location = detail["loc"]
    start = location.index(SOURCE) + 1 if SOURCE in location else 0
    model = SourceSection if start else RunConfig
    return describe(detail | {"loc": _untagged(location[start:])}, model, _untagged(location[:start]))


def _place(location: Sequence[str | int], places: Mapping[tuple[str, ...], str]) -> str:
    """Where the setting at ``location`` was written, or else the section around it."""
    path = tuple(str(part) for part in location)
    return next(places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in places)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
