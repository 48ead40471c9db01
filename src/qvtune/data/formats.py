"""One record of a source -> a row, by the format of the source."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qvtune.data.glue import glue_row
from qvtune.data.messages import checked, json_type, parse_messages, parse_sharegpt, parse_tools, text
from qvtune.data.rows import (
    MISSING_COLUMN,
    UNKNOWN_COLUMNS,
    BadRowError,
    ChatRow,
    LabelledRow,
    PlainTextRow,
    Row,
    TextRow,
)

_COLUMNS_OF: dict[
    str, tuple[list[tuple[str, ...]], tuple[str, ...]]
] = {  # format -> columns that a row must have, in one of several ways; and others that it may have
    "chat": ([("messages",), ("conversations",)], ("tools",)),
    "prompt_completion": ([("prompt", "completion")], ("tools",)),
    "instruction": ([("instruction", "output")], ("input", "system")),
    "text": ([("text",)], ()),
    "labelled": ([("text", "label")], ("text_pair",)),
}
FORMATS = tuple(_COLUMNS_OF)


class Record(NamedTuple):
    """A row as it is in the file: a line of JSON, or column -> value, or why it is neither. Cheap to pickle.

    ``place`` is ``FILE:LINE``, ``FILE:LINE item N`` or ``FILE row N``, from 1.
    """

    place: str
    value: bytes | dict[Any, Any] | BadRowError


@dataclass(frozen=True)
class RowParser:
    """Makes rows of the records of one source; without a state, for any process.

    Attributes:
        format: one of FORMATS; ``auto`` where no row of the source is good.
        columns: our name of a column -> that of the source, or its number.
        glue: the task of GLUE whose columns and labels the rows have.
    """

    format: str
    columns: Mapping[str, str | int]
    glue: str | None = None

    def parse(self, record: Record) -> Row:
        """The row of a record. Raises BadRowError where it cannot be used."""
        value = self.read(record)
        if self.format in FORMATS and self._may_be(self.format, value):
            return _PARSERS[self.format](record.place, value)
        found = self.candidates(value)[0]
        if self.format == "auto":
            return _PARSERS[found](record.place, value)
        raise BadRowError(
            f"a {found} row, but data.format (or, with auto, the first good row) is {self.format}", "another format"
        )

    def read(self, record: Record) -> dict[Any, Any]:
        """Column -> value of a record, with our names. Raises BadRowError where it is none, or lacks a column."""
        if isinstance(record.value, BadRowError):
            raise record.value
        value: dict[Any, Any] = _parse_object(record.value) if isinstance(record.value, bytes) else record.value
        renamed = self._renamed(value)
        return renamed if self.glue is None else glue_row(self.glue, renamed)

    def _renamed(self, value: dict[Any, Any]) -> dict[Any, Any]:
        if not self.columns:
            return value
        for ours, theirs in self.columns.items():
            if theirs not in value:
                raise BadRowError(
                    f"it has no column {theirs!r}, which `columns` gives for {ours}; its columns are {_names(value)}",
                    MISSING_COLUMN,
                )
        taken = {*self.columns.values(), *self.columns}
        rest = {name: one for name, one in value.items() if name not in taken}
        return rest | {ours: value[theirs] for ours, theirs in self.columns.items()}

    def candidates(self, value: Mapping[str, Any]) -> list[str]:
        """The formats that a row with these columns has. Raises BadRowError where there is none."""
        found = [name for name in FORMATS if self._may_be(name, value)]
        if "labelled" in found and self.format != "text":
            found = [name for name in found if name != "text"]
        if not found:
            raise BadRowError(f"the keys are {_names(value)}, but it needs {self._wanted()}", UNKNOWN_COLUMNS)
        return found

    def _may_be(self, name: str, value: Mapping[str, Any]) -> bool:
        """Whether the columns of a format are there, and it has a use for every column that was named."""
        choices, more = _COLUMNS_OF[name]
        useful = {*more, *(column for choice in choices for column in choice)}
        return useful >= self.columns.keys() and any(value.keys() >= set(choice) for choice in choices)

    def _wanted(self) -> str:
        names = FORMATS if self.format == "auto" else (self.format,)
        choices = [" and ".join(f"`{one}`" for one in choice) for name in names for choice in _COLUMNS_OF[name][0]]
        listed = ", ".join(choices[:-1]) + (", or " if len(choices) > 2 else " or ") + choices[-1]
        needed = listed if len(choices) > 1 else choices[0]
        return f"{needed}; `columns` of the source says where they have other names"


def _names(value: Mapping[Any, Any]) -> list[Any]:
    return sorted(value, key=str)


def _parse_object(raw: bytes) -> dict[str, Any]:
    line = raw.rstrip()
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start + 1} of the line", "not UTF-8") from error
    except json.JSONDecodeError as error:
        end = "" if raw.endswith(b"\n") else " (the file ends there, without a line end: it may not be complete)"
        raise BadRowError(f"not JSON: {error.msg} at column {error.colno}{end}", "not JSON") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
        raise BadRowError(f"not usable JSON: {error}", "not JSON") from error
    if not isinstance(value, dict):
        raise BadRowError(f"a JSON {json_type(value)}, but each line must be a JSON object", "not a JSON object")
    return value


def _parse_chat(place: str, value: dict[str, Any]) -> ChatRow:
    if "messages" in value:
        messages = parse_messages("messages", value["messages"])
    else:
        messages = parse_sharegpt(value["conversations"])
    return checked(ChatRow(place, messages, tools=parse_tools(value.get("tools"))))


def _parse_prompt_completion(place: str, value: dict[str, Any]) -> Row:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = parse_messages("prompt", prompt)
        messages = context + parse_messages("completion", completion)
        return checked(ChatRow(place, messages, len(context), parse_tools(value.get("tools"))))
    return TextRow(place, text("prompt", prompt), _not_empty("completion", completion))


def _parse_instruction(place: str, value: dict[str, Any]) -> ChatRow:
    """As the chat template asks for it: the instruction and its input are the user's message."""
    parts = [_not_empty("instruction", value["instruction"])]
    if value.get("input") is not None and text("input", value["input"]).strip():
        parts.append(value["input"])
    messages = [
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": _not_empty("output", value["output"])},
    ]
    if value.get("system") is not None and text("system", value["system"]).strip():
        messages.insert(0, {"role": "system", "content": value["system"]})
    return ChatRow(place, tuple(messages))


def _parse_text(place: str, value: dict[str, Any]) -> PlainTextRow:
    return PlainTextRow(place, _not_empty("text", value["text"]))


def _parse_labelled(place: str, value: dict[str, Any]) -> LabelledRow:
    pair = value.get("text_pair")
    first, second = _not_empty("text", value["text"]), None if pair is None else text("text_pair", pair)
    return LabelledRow(place, first, second, _label(value["label"]))


def _label(value: Any) -> str:
    """The same text whether a file has numbers or text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and json_type(value) != "NaN"):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "empty text" if isinstance(value, str) else json_type(value)
        raise BadRowError(f"`label` must be text or a number, found {found}", "no label")
    return text("label", value)


def _not_empty(where: str, value: Any) -> str:
    if not text(where, value).strip():
        raise BadRowError(f"`{where}` is empty", "empty text")
    return str(value)


_PARSERS: dict[str, Callable[[str, dict[str, Any]], Row]] = {
    "chat": _parse_chat,
    "prompt_completion": _parse_prompt_completion,
    "instruction": _parse_instruction,
    "text": _parse_text,
    "labelled": _parse_labelled,
}
assert _PARSERS.keys() == _COLUMNS_OF.keys()


def excerpt(value: Mapping[str, Any], num_characters: int = 60) -> str:
    """A row for people: each value shortened."""
    parts = []
    for name, one in value.items():
        shown = json.dumps(one, ensure_ascii=False, default=str)
        parts.append(f"{name}: {shown if len(shown) <= num_characters else shown[:num_characters] + '...'}")
    return "{" + ", ".join(parts) + "}"
