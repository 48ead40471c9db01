"""All settings as a table, made from the schema: for ``launch/train.py --settings`` and for launch/README.md."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from rich.table import Column, Table
from rich.text import Text

from qvtune.config.data import DataSection, SourceSection
from qvtune.config.problems import closest, section_type, suggestion
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.errors import UserError

TOP_LEVEL = "top level"
SOURCE_SECTION = "data.train"  # where a source is written; data.eval takes the same
_BOUNDS = {  # JSON schema's words, and those that pydantic keeps of nested types
    "> ": ("exclusiveMinimum", "gt"),
    ">= ": ("minimum", "ge"),
    "< ": ("exclusiveMaximum", "lt"),
    "<= ": ("maximum", "le"),
}
_TYPES = {"string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Setting:
    """One setting. ``name`` is what is typed before ``=``; ``default`` is written as in YAML, or is ``required``."""

    name: str
    type: str
    default: str
    description: str


def sections() -> dict[str, list[Setting]]:
    """Section -> its settings; first the settings outside sections, under ``TOP_LEVEL``."""
    return {name: list(_settings(model, "" if name == TOP_LEVEL else f"{name}.")) for name, model in _models().items()}


def _models() -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {TOP_LEVEL: RunConfig}
    for name, field in RunConfig.model_fields.items():
        section = section_type(field.annotation)
        if section is not None:
            found[name] = section
            inner = {f"{name}.{key}": section_type(one.annotation) for key, one in section.model_fields.items()}
            found |= {path: model for path, model in inner.items() if model is not None}
        if section is DataSection:
            found[SOURCE_SECTION] = SourceSection
    return found


def show_settings(section: str = "") -> None:
    """Print the settings of one section, or of all. Raises UserError for a section that there is not."""
    found = sections()
    if section and section not in found:
        names = [name for name in found if name != TOP_LEVEL]
        hint = suggestion(closest(section, names), names)
        raise UserError(f"--settings {section}: no such section; {hint}")
    table = Table(
        Column("setting", no_wrap=True), "type", "default", "meaning", box=None, pad_edge=False, padding=(0, 3, 0, 0)
    )
    for name in [section] if section else found:
        for setting in found[name]:
            table.add_row(*map(Text, (setting.name, setting.type, setting.default, setting.description)))
        table.add_section()
    console().print(table)


def markdown() -> str:
    """The same as tables in Markdown, one for each section."""
    lines = []
    for section, settings in sections().items():
        doc = _models()[section].__doc__
        assert doc
        lines += [
            f"### {section}",
            "",
            doc.replace("``", "`"),
            "",
            "| setting | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for setting in settings:
            meaning = setting.description.replace("|", "\\|")
            lines.append(f"| `{setting.name}` | {setting.type} | `{setting.default}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _settings(section: type[BaseModel], prefix: str) -> Iterator[Setting]:
    schema = section.model_json_schema()
    for name, node in schema["properties"].items():
        if section_type(section.model_fields[name].annotation) is None:
            required = name in schema.get("required", ())
            default = node.get("default", {})  # an empty mapping comes from a factory, which JSON schema does not show
            shown = "required" if required else _as_yaml(default)
            yield Setting(prefix + name, _type(node), shown, node.get("description", ""))


def _type(node: Mapping[str, Any]) -> str:
    """What a value may be, in words; ``node`` is a JSON schema."""
    if "anyOf" in node:
        return " or ".join(_type(choice) for choice in node["anyOf"])
    if "const" in node or "enum" in node:
        return ", ".join(map(str, node.get("enum", [node.get("const")])))
    match node["type"]:
        case "array" if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}: {_type(node['prefixItems'][0])}"
        case "array":
            return f"list of: {_type(node['items'])}"
        case "object":
            return f"mapping: text -> {_type(node['additionalProperties'])}"
        case "integer" | "number" as kind:
            limits = [sign + f"{node[word]}" for sign, words in _BOUNDS.items() for word in words if word in node]
            return " ".join(["whole number" if kind == "integer" else "number", ", ".join(limits)]).strip()
        case kind:
            return _TYPES.get(kind, str(kind))  # a type of ours is already in words


def _as_yaml(value: object) -> str:
    """On one line, without quotes: ``[q, v]``, ``true``, ``1e-08``."""
    match value:
        case list():
            return f"[{', '.join(_as_yaml(item) for item in value)}]"
        case str():
            return value
        case _:
            return json.dumps(value)
