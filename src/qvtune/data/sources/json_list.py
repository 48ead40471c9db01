"""A file that is one JSON list -> its items, with no more of it in memory than an item and a chunk."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qvtune.errors import UserError

_CHUNK_CHARACTERS = 2**16
_NO_SPACE = re.compile(r"\S")
_LONGEST_LITERAL = 16  # `-Infinity` or an escaped character, which the end of a chunk may have cut


def list_items(file: Path, stream: TextIO) -> Iterator[tuple[int, Any]]:
    """Line, from 1, and value of each item. Raises UserError, with the line, where the text is no JSON list."""
    text = _Text(stream)
    try:
        text.take("[")
        if text.next_character() == "]":
            return
        while True:
            text.next_character()
            line = text.line
            yield line, text.value()
            if text.take(",]") == "]":
                break
        if text.next_character():
            raise json.JSONDecodeError("something follows the list", text.held, text.position)
    except json.JSONDecodeError as error:
        line = text.line + text.held.count("\n", text.position, error.pos)
        end = "" if text.held[error.pos :].strip() else " (the file ends there: it may not be complete)"
        raise UserError(f"{file}:{line}: not JSON: {error.msg}{end}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (after line {text.line})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
        raise UserError(f"{file}:{text.line}: not usable JSON: {error}") from error


class _Text:
    """A stream that is read as far as it is needed; ``held[position:]`` comes next, in line ``line``."""

    def __init__(self, stream: TextIO) -> None:
        self.held, self.position, self.line = "", 0, 1
        self._stream, self._decoder = stream, json.JSONDecoder()

    def next_character(self) -> str:
        """The next one that is no white space, which is not taken; empty at the end."""
        while True:
            if found := _NO_SPACE.search(self.held, self.position):
                self._advance(found.start())
                return found[0]
            self._advance(len(self.held))
            if not self._read_more():
                return ""

    def take(self, allowed: str) -> str:
        """The next character, which must be one of ``allowed``."""
        found = self.next_character()
        if not found or found not in allowed:
            raise json.JSONDecodeError(f"expected {' or '.join(allowed)}", self.held, self.position)
        self._advance(self.position + 1)
        return found

    def value(self) -> Any:
        """The value that begins at ``position``."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.held, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.held) - _LONGEST_LITERAL
                if not cut or not self._read_more():
                    raise
            else:
                self._advance(end)
                return value

    def _advance(self, position: int) -> None:
        self.line += self.held.count("\n", self.position, position)
        self.position = position

    def _read_more(self) -> bool:
        more = self._stream.read(max(_CHUNK_CHARACTERS, len(self.held) - self.position))
        self.held, self.position = self.held[self.position :] + more, 0
        return bool(more)
