"""The kinds of rows, and what is wrong with those that cannot be used."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qvtune.errors import UserError

MAX_PROBLEMS_SHOWN = 10
ROLES = ("system", "user", "assistant", "tool")
MISSING_COLUMN, UNKNOWN_COLUMNS = "missing column", "columns of no format"  # kinds of bad rows

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatRow:
    """A conversation, as the tokenizer's chat template takes it.

    Assistant messages from index ``first_reply`` on have labels, those before it are context. At least one of them is
    not empty.

    Attributes:
        place: of the row, for messages: ``FILE:LINE``, or ``FILE row N``.
        messages: ``role`` (one of ROLES) and ``content`` (text), and where the row has them ``tool_calls``,
            ``reasoning_content``, ``tool_call_id`` and ``name``.
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
        super().__init__(reason, kind)
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return self.reason

    @property
    def concerns_columns(self) -> bool:
        """Whether all rows of a table are bad for this reason if one is."""
        return self.kind in (MISSING_COLUMN, UNKNOWN_COLUMNS)


@dataclass
class BadRows:
    """What was wrong with the rows of one source.

    Attributes:
        source: its name in messages.
        kinds: how many rows were bad, by ``BadRowError.kind``.
        problems: of the first bad rows, with their places.
    """

    source: str
    on_bad_row: str
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """All bad rows."""
        return self.kinds.total()

    def add(self, place: str, error: BadRowError) -> None:
        """Count a row; place and reason are kept for the first ones."""
        self.kinds[error.kind] += 1
        if len(self.problems) < MAX_PROBLEMS_SHOWN:
            self.problems.append(f"{place}: {error}.")

    def check(self, num_good: int) -> None:
        """Raise UserError if there are bad rows and they may not be skipped, or if no good row is left."""
        if num_good and (not self.count or self.on_bad_row == "skip"):
            return
        if not self.count:
            raise UserError(f"{self.source} has no rows; it must have at least one.")
        num_more = self.count - len(self.problems)
        more = f"{num_more} more bad rows in the source. " if num_more else ""
        if num_good:
            advice = f"{num_good} rows are good; data.on_bad_row=skip skips the bad ones."
        else:
            advice = "No row is good."
        raise UserError([*self.problems, more + advice])
