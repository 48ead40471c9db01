"""A file of one JSON object per line, which one process appends to."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from qvtune.console import console

Entry = dict[str, Any]
_BATCH_BYTES = 2**19


class JsonLines:
    """Appends objects to ``path``, whose lines an earlier process may have written.

    A line that a crash has cut off is removed, and so are lines that ``keep`` refuses. ``workspace``: as in
    qvtune/checkpoint/folder.py. Where the file system refuses lines later, that is said once; they are kept until they
    can be written.
    """

    def __init__(self, path: Path, workspace: Path | None = None, keep: Callable[[Entry], bool] | None = None) -> None:
        self._name, own = path.name, (workspace or path.parent) / f".{path.name}"
        content = path.read_bytes() if path.exists() else b""
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        own.write_bytes(b"".join(line for line in lines if keep is None or keep(json.loads(line))))
        # A new file: a process of an earlier run that still has the old one open cannot append to this one.
        self._file = own.open("a", encoding="utf-8")
        os.replace(own, path)
        self._is_late = False

    def write(self, entry: Entry) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(entry) + "\n")
        try:
            self._file.flush()  # where that fails the file object keeps what is left, and the next flush writes it
            self._is_late = False
        except OSError as error:
            if not self._is_late:
                console().print(f"{self._name}: {error}; its lines are kept and tried again", markup=False)
            self._is_late = True

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self._file.close()
        except OSError as error:
            console().print(f"the last lines of {self._name} are lost: {error}", markup=False)


class JsonLinesReader:
    """Reads ``path``, which may be growing, from ``offset`` bytes on; each object once.

    ``offset`` becomes the end of the last line that was read. A line that is not complete yet is left for later.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.offset = offset
        self._path, self._file = path, path.open("rb")

    def batches(self) -> Iterator[list[Entry]]:
        """The objects that are there now, some thousand at a time: parsed together they take half of the time."""
        while True:
            self._file.seek(self.offset)
            lines = self._file.readlines(_BATCH_BYTES)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            if not lines:
                return
            self.offset += sum(map(len, lines))
            yield _parse(b"[" + b",".join(lines) + b"]")

    def is_current(self) -> bool:
        """Whether the file is still the one at its path, and not one that a later writer has replaced."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parse(content: bytes) -> list[Entry]:
    """orjson takes half of the time; json reads NaN, which a metric may be, as well."""
    try:
        entries: list[Entry] = orjson.loads(content)
    except orjson.JSONDecodeError:
        entries = json.loads(content)
    return entries


def read_json_lines(path: Path) -> list[Entry]:
    """All objects of a file that may be growing, or whose last line a crash has cut off; that line is left out."""
    reader = JsonLinesReader(path)
    try:
        return [entry for batch in reader.batches() for entry in batch]
    finally:
        reader.close()
