"""A file of one JSON object per line, which one process appends to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvtune.console import console

Entry = dict[str, Any]


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


def read_json_lines(path: Path) -> list[Entry]:
    """All objects of a file that may be growing, or whose last line a crash has cut off; that line is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
