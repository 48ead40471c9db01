"""Messages of a conversation, as files have them -> as chat templates take them."""

import json
import math
from collections.abc import Iterator
from typing import Any

from qvtune.data.rows import ROLES, BadRowError, ChatRow, Message

SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}


def parse_messages(key: str, value: Any) -> tuple[Message, ...]:
    """``value``: a list of messages with ``role`` and ``content``, or the same as JSON text."""
    return tuple(_message(where, item) for where, item in _objects(key, value))


def parse_sharegpt(value: Any) -> tuple[Message, ...]:
    """``value``: a list of messages with ``from`` and ``value``, or the same as JSON text."""
    return tuple(
        {
            "role": SHAREGPT_ROLES[_role(where, item, "from", tuple(SHAREGPT_ROLES))],
            "content": text(f"{where}.value", item.get("value")),
        }
        for where, item in _objects("conversations", value)
    )


def parse_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """``value``: a list of descriptions of functions, the same as JSON text, or nothing."""
    listed = _from_json("tools", value)
    return tuple(_objects_of("tools", listed)) if listed else None


def checked(row: ChatRow) -> ChatRow:
    """The row, if there is an answer in it to train on and something before it."""
    if row.messages[0]["role"] == "assistant":
        raise BadRowError("the first message is the assistant's, but an answer needs a message before it", "no answer")
    replies = [message for message in row.messages[row.first_reply :] if message["role"] == "assistant"]
    if not replies:
        raise BadRowError("no message of the assistant, so nothing to train on", "no answer")
    if not any(map(_says_something, replies)):
        one = "a message" if len(replies) == 1 else "every message"
        raise BadRowError(f"{one} of the assistant is empty", "empty answer")
    return row


def text(where: str, value: Any) -> str:
    """``value``, if it is text."""
    if not isinstance(value, str):
        raise BadRowError(f"`{where}` must be text, found {json_type(value)}", "no text where there must be some")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if "\udc80" <= value[error.start] <= "\udcff":  # what a byte that is not UTF-8 was read as
            raise BadRowError(f"`{where}` is not UTF-8 at character {error.start + 1}", "not UTF-8") from error
        reason = f"`{where}` holds half a surrogate pair at character {error.start + 1}"
        raise BadRowError(reason, "half a surrogate pair") from error
    return value


def json_type(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _message(where: str, item: dict[str, Any]) -> Message:
    """``content`` may be left out where an assistant calls tools; templates get an empty text then."""
    role = _role(where, item, "role", ROLES)
    more: Message = {}
    for key in ("reasoning_content", "tool_call_id", "name"):
        if item.get(key) is not None:
            more[key] = text(f"{where}.{key}", item[key])
    if calls := _from_json(f"{where}.tool_calls", item.get("tool_calls")):
        more["tool_calls"] = _objects_of(f"{where}.tool_calls", calls)
    content = item.get("content")
    if content is None and role == "assistant" and more.keys() & {"tool_calls", "reasoning_content"}:
        content = ""
    return {"role": role, "content": text(f"{where}.content", content), **more}


def _objects(key: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    value = _from_json(key, value)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"`{key}` must be a list of at least one message", "no list of messages")
    for index, item in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise BadRowError(f"`{where}` must be an object, found {json_type(item)}", "no list of messages")
        yield where, item


def _objects_of(where: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRowError(f"`{where}` must be a list of objects", "no list of objects")
    text(where, json.dumps(value, ensure_ascii=False))
    return value


def _from_json(where: str, value: Any) -> Any:
    """A list that a table holds as text."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"`{where}` is text that is no JSON list: {error}", "not JSON") from error


def _role(where: str, item: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    role = item.get(key)
    if not isinstance(role, str) or role not in allowed:
        found = json.dumps(role, default=str)
        raise BadRowError(f"`{where}.{key}` is {found}, allowed are {', '.join(allowed)}", "unknown role")
    return role
