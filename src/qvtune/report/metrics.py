"""metrics.jsonl, the record of a run: one JSON object per line."""

import json
import os
import time
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends events to ``run_dir/metrics.jsonl``; numbers of steps, evaluations and generations also to TensorBoard.

    For rank 0 alone. ``workspace``: as in qvtune/checkpoint/folder.py.
    """

    def __init__(self, run_dir: Path, first_step: int, workspace: Path | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path, own = run_dir / "metrics.jsonl", (workspace or run_dir) / ".metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        own.write_bytes(content[: content.rfind(b"\n") + 1])  # a crash may have left the last line incomplete
        # A new file: a process of an earlier run that still has the old one open cannot append to this one.
        self._file = own.open("a", encoding="utf-8")
        os.replace(own, path)
        # After a crash, steps since the last checkpoint are run again: TensorBoard drops their first values.
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line and flush it: {"event", "time" (seconds since 1970), ...fields}."""
        self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
        self._file.flush()
        if event in ("step", "eval", "generation"):
            self._to_board(event, fields, fields["step"])

    def _to_board(self, event: str, fields: dict[str, Any], step: int) -> None:
        """Entries of a mapping, however deep, by their path: eval/sets/NAME/loss."""
        for key, value in fields.items():
            if isinstance(value, dict):
                self._to_board(f"{event}/{key}", value, step)
            elif key != "step" and isinstance(value, int | float):
                self._board.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        """Flush and close metrics.jsonl and TensorBoard."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """All events of one kind, in order. If a step was run twice (crash, resume), only its last event."""
    events: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        entry = json.loads(line)
        if entry["event"] == event:
            key = entry["step"] if event in ("step", "eval", "generation", "checkpoint") else number
            events.pop(key, None)
            events[key] = entry
    return list(events.values())
