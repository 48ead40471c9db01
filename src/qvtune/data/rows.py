"""JSONL files -> conversations and prompt/completion pairs, or one message that lists the bad rows."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from qvtune.errors import UserError

MAX_PROBLEMS_SHOWN = 10
ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("tool_calls", "reasoning_content", "tool_call_id", "name")  # beside role and content
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatRow:
    """A conversation, as the tokenizer's chat template takes it.

    Assistant messages from index ``first_reply`` on have labels, those before it are context.

    Attributes:
        place: of the row, for messages: ``FILE:LINE``, or ``FILE row N``.
        messages: ``role`` (one of ROLES) and ``content`` (text), and where the row has them MESSAGE_KEYS.
        tools: descriptions of functions that the model may call; None where the row has none.
    """

    place: str
    messages: tuple[Message, ...]
    first_reply: int = 0
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class TextRow:
    """A prompt without labels and its completion, which has labels."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainTextRow:
    """Text whose tokens all have labels; what is longer than ``max_length`` tokens is divided, not cut."""

    place: str
    text: str


@dataclass(frozen=True)
class LabelledRow:
    """A text, or a pair of texts, and its class or number as text: `0`, `positive`, `3.6`."""

    place: str
    text: str
    text_pair: str | None
    label: str


Row = ChatRow | TextRow | PlainTextRow | LabelledRow


class BadRowError(ValueError):
    """One row cannot be used; the text is the reason. ``data.on_bad_row`` decides whether that is an error.

    ``kind``: the reason without what differs from row to row, under which rows that are skipped are counted.
    """

    def __init__(self, reason: str, kind: str = "other") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class BadRows:
    """What was wrong with the rows of one source."""

    source: str
    on_bad_row: str
    count: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, place: str, reason: BadRowError) -> None:
        """Count a row; place and reason are kept for the first ones."""
        self.count += 1
        if len(self.problems) < MAX_PROBLEMS_SHOWN:
            self.problems.append(f"{place}: {reason}.")

    def check(self, num_good: int) -> None:
        """Raise UserError if there are bad rows and they may not be skipped, or if no good row is left."""
        if num_good and (not self.count or self.on_bad_row == "skip"):
            return
        if not self.count:
            raise UserError(f"{self.source} has no rows; it must hold one JSON object per line.")
        num_more = self.count - len(self.problems)
        more = f"{num_more} more bad rows in the file. " if num_more else ""
        if num_good:
            advice = f"{num_good} rows are good; data.on_bad_row=skip skips the bad ones."
        else:
            advice = "No row is good."
        raise UserError([*self.problems, more + advice])


def read_rows(
    path: Path,
    format: str,
    on_bad_row: str,
    between_rows: Callable[[], None] = lambda: None,
    max_rows: int | None = None,
) -> tuple[list[Row], int]:
    """Return the rows of a JSONL file (UTF-8, one object per line, blank lines ignored) and how many were skipped.

    ``format`` is ``chat`` (``messages`` with role/content, or ``conversations`` with from/value as ShareGPT has them),
    ``prompt_completion`` (both text, or both lists of messages as TRL has them) or ``auto``: as the first good row.
    Keys that are not needed are ignored. At most ``max_rows`` rows are read.

    Raises UserError with file, line and reason of the first bad rows where ``on_bad_row`` is ``error``,
    and in any case where the file cannot be read or no row is left.
    """
    bad = BadRows(str(path), on_bad_row)
    rows: list[Row] = []
    expected = None if format == "auto" else format
    for line, raw in islice(_lines(path), max_rows):
        between_rows()
        place = f"{path}:{line}"
        try:
            value = _parse_object(raw)
            row_format = _format_of(value, expected)
            rows.append(_PARSERS[row_format](place, value))
            expected = row_format
        except BadRowError as reason:
            bad.add(place, reason)
    bad.check(len(rows))
    return rows, bad.count


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal; UserError where it cannot be read."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}. Give a JSONL file (one JSON object per line) or `demo`."
        ) from error
    with file:
        yield file


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if raw.strip():
                yield line, raw.rstrip()


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
        raise BadRowError(f"not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRowError(f"a JSON {_json_type(value)}, but each line must be a JSON object")
    return value


def _format_of(value: dict[str, Any], expected: str | None) -> str:
    found = [
        name
        for name, is_there in (
            ("chat", "messages" in value or "conversations" in value),
            ("prompt_completion", "prompt" in value and "completion" in value),
        )
        if is_there
    ]
    if not found:
        raise BadRowError(
            f"the keys are {sorted(value)}, but it needs `messages`, `conversations`, or `prompt` and `completion`"
        )
    if expected is None:
        return found[0]
    if expected not in found:
        raise BadRowError(f"a {found[0]} row, but data.format (or, with auto, the first good row) is {expected}")
    return expected


def _parse_chat(place: str, value: dict[str, Any]) -> ChatRow:
    if "messages" in value:
        messages = _parse_messages("messages", value["messages"])
    else:
        messages = _parse_sharegpt(value["conversations"])
    return _checked(ChatRow(place, messages))


def _parse_prompt_completion(place: str, value: dict[str, Any]) -> Row:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _parse_messages("prompt", prompt)
        return _checked(ChatRow(place, context + _parse_messages("completion", completion), first_reply=len(context)))
    row = TextRow(place, _text("prompt", prompt), _text("completion", completion))
    if not row.completion.strip():
        raise BadRowError("`completion` is empty")
    return row


_PARSERS: dict[str, Callable[[str, dict[str, Any]], Row]] = {
    "chat": _parse_chat,
    "prompt_completion": _parse_prompt_completion,
}


def _parse_messages(key: str, value: Any) -> tuple[Message, ...]:
    return tuple(
        {"role": _role(where, item, "role", ROLES), "content": _text(f"{where}.content", item.get("content"))}
        for where, item in _objects(key, value)
    )


def _parse_sharegpt(value: Any) -> tuple[Message, ...]:
    return tuple(
        {
            "role": SHAREGPT_ROLES[_role(where, item, "from", tuple(SHAREGPT_ROLES))],
            "content": _text(f"{where}.value", item.get("value")),
        }
        for where, item in _objects("conversations", value)
    )


def _objects(key: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"`{key}` must be a list of at least one message")
    for index, item in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise BadRowError(f"`{where}` must be an object, found {_json_type(item)}")
        yield where, item


def _role(where: str, item: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    role = item.get(key)
    if not isinstance(role, str) or role not in allowed:
        raise BadRowError(f"`{where}.{key}` is {json.dumps(role)}, allowed are {', '.join(allowed)}")
    return role


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"`{where}` must be text, found {_json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"`{where}` holds half a surrogate pair at character {error.start + 1}") from error
    return value


def _checked(row: ChatRow) -> ChatRow:
    if row.messages[0]["role"] == "assistant":
        raise BadRowError("the first message is the assistant's, but an answer needs a message before it")
    replies = [message for message in row.messages[row.first_reply :] if message["role"] == "assistant"]
    if not replies:
        raise BadRowError("no message of the assistant, so nothing to train on")
    if not all(message["content"].strip() for message in replies):
        raise BadRowError("a message of the assistant is empty")
    return row


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
