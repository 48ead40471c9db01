"""metrics.jsonl, the record of a run: one JSON object per line."""

import time
from pathlib import Path
from typing import Any

from qvtune.console import console
from qvtune.report.json_lines import JsonLines, read_json_lines


class MetricsLog:
    """Appends events to ``run_dir/metrics.jsonl``; numbers of steps, evaluations and generations also to TensorBoard.

    For rank 0 alone. ``workspace``: as in qvtune/checkpoint/folder.py. What the file system refuses later does not end
    a run: it is said once; lines are kept until they can be written, TensorBoard ends.
    """

    def __init__(self, run_dir: Path, first_step: int, workspace: Path | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._lines = JsonLines(run_dir / "metrics.jsonl", workspace)
        # After a crash, steps since the last checkpoint are run again: TensorBoard drops their first values.
        self._board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line and flush it: {"event", "time" (seconds since 1970), ...fields}."""
        self._lines.write({"event": event, "time": time.time(), **fields})
        if self._board is not None and event in ("step", "eval", "generation"):
            try:
                self._to_board(event, fields, fields["step"])
            except OSError as error:
                console().print(f"tensorboard: {error}; it is off until the next start", markup=False)
                self._board = None

    def _to_board(self, event: str, fields: dict[str, Any], step: int) -> None:
        """Entries of a mapping, however deep, by their path: eval/sets/NAME/loss."""
        for key, value in fields.items():
            if isinstance(value, dict):
                self._to_board(f"{event}/{key}", value, step)
            elif key != "step" and isinstance(value, int | float):
                self._board.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        """Flush and close metrics.jsonl and TensorBoard."""
        self._lines.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                console().print(f"the last values of tensorboard are lost: {error}", markup=False)


def read_metrics(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """All events of one kind, in order. If a step was run twice (crash, resume), only its last event."""
    events: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(read_json_lines(run_dir / "metrics.jsonl")):
        if entry["event"] == event:
            key = entry["step"] if event in ("step", "eval", "generation", "checkpoint") else number
            events.pop(key, None)
            events[key] = entry
    return list(events.values())
