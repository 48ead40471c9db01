"""What a run folder says about its run, read from its files alone."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvtune.distributed.hang_reports import verdict_messages
from qvtune.errors import UserError
from qvtune.report.history import METRICS, History, read_history

Values = dict[str, Any]
_REASONS = {"completed": "completed", "stopped": "stopped on request after a complete checkpoint; it can be resumed"}


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not. ``merges``: folder -> merge_report.json in it. ``hangs``: seconds since 1970 -> what was
    said.

    ``is_alive``: whether its process is known to live, or to have ended; None: not known. ``time``: when it was read.
    """

    run_dir: Path
    config: Values
    deepspeed: Values
    data: Values
    environment: Values
    history: History
    merges: dict[str, Values]
    hangs: dict[float, str]
    is_alive: bool | None
    time: float

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.run_dir.resolve().name

    @property
    def max_steps(self) -> int:
        """Steps of the whole run, by its last start."""
        return int(self.history.starts[-1].begin.get("max_steps", 0)) if self.history.starts else 0

    @property
    def last_step(self) -> int:
        """The last complete step."""
        return self.history.starts[-1].last_step if self.history.starts else 0

    @property
    def state(self) -> str:
        """In words: how far it is, and whether it goes on."""
        if not self.history.starts:
            return "no event is recorded yet"
        last, done = self.history.starts[-1], f"step {self.last_step} of {self.max_steps}"
        if last.end is not None:
            return f"{_REASONS.get(last.end['reason'], last.end['reason'])}: {done}"
        if last.error:
            return f"failed: {done}: {last.error}"
        if self.is_alive:
            return f"running: {done}"
        if self.is_alive is None:
            ago = duration(max(self.time - last.last_time, 0.0))
            return f"running, or ended without run_end: {done}, last event {ago} ago"
        return f"ended before its end (failed, killed or hung; the console or logs/ say more): {done}"


def read_run(run_dir: Path, history: History | None = None, *, is_alive: bool | None = None) -> RunRecord:
    """Read the record of a run; ``history`` where metrics.jsonl has been read already.

    Raises UserError where the folder is none of a run, or one of its files is damaged.
    """
    require_run(run_dir)
    try:
        return RunRecord(
            run_dir=run_dir,
            config=read_settings(run_dir),
            deepspeed=_read(run_dir / "deepspeed.json"),
            data=_read(run_dir / "data.json"),
            environment=_read(run_dir / "environment.json"),
            history=read_history(run_dir) if history is None else history,
            merges={path.parent.name: _read(path) for path in sorted(run_dir.glob("*/merge_report.json"))},
            hangs=verdict_messages(run_dir / "logs"),
            is_alive=is_alive,
            time=time.time(),
        )
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir}: a file of the run cannot be read ({error})") from error


def read_runs(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """``read_run`` for each. Raises UserError naming all that are none."""
    records: list[RunRecord] = []
    problems: list[str] = []
    for run_dir in run_dirs:
        try:
            records.append(read_run(run_dir))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return records


def require_run(run_dir: Path) -> None:
    """Raises UserError where the folder is none of a run."""
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir} is no run folder: it has no {METRICS}; give the run_dir of a run")


def read_settings(run_dir: Path) -> Values:
    """config.yaml; empty where there is none."""
    return _read(run_dir / "config.yaml")


def _read(path: Path) -> Values:
    """A YAML or JSON file; empty where there is none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    found: Values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return found


def duration(seconds: float) -> str:
    """``12 s``, ``3 min 20 s``, ``5 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flattened(values: Values, prefix: str = "") -> dict[str, Any]:
    """Settings by their full name: ``optimizer.lr``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
