"""metrics.jsonl, the record of a run: one JSON object per line."""

import time
from pathlib import Path
from typing import Any

from qvtune.report.json_lines import JsonLines, read_json_lines


class MetricsLog:
    """Appends events to ``run_dir/metrics.jsonl``, which others follow: ``qvtune.report.followers``.

    For rank 0 alone. ``workspace``: as in qvtune/checkpoint/folder.py. What the file system refuses later does not end
    a run: it is said once; lines are kept until they can be written.
    """

    def __init__(self, run_dir: Path, workspace: Path | None = None) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl", workspace)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line and flush it: {"event", "time" (seconds since 1970), ...fields}."""
        self._lines.write({"event": event, "time": time.time(), **fields})

    def close(self) -> None:
        """Flush and close the file."""
        self._lines.close()


def read_metrics(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """All events of one kind, in order. If a step was run twice (crash, resume), only its last event."""
    events: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(read_json_lines(run_dir / "metrics.jsonl")):
        if entry["event"] == event:
            key = entry["step"] if event in ("step", "eval", "generation", "checkpoint") else number
            events.pop(key, None)
            events[key] = entry
    return list(events.values())
