"""What watchers tell each other about a hang, in files of ``run_dir/logs`` that all hosts see.

hang-START/rank-1.json     the report of a rank that is silent, there only as long as it is
hang-START.json            the verdict, written once: then all ranks end. START names this start of the run
stacks-START-rank-1.txt    Python's stacks of a rank when it was ended
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvtune.errors import HUNG_EXIT_CODE

_RANKS_SHOWN = 8


@dataclass(frozen=True)
class Report:
    """A silent rank: ``where`` it was last seen, for how long it has been silent, and what it does instead.

    ``is_waiting``: it waits for other ranks in a collective, so that one of these is to blame.
    """

    rank: int
    host: str
    where: str
    silent_seconds: float
    does: str
    is_waiting: bool

    @property
    def text(self) -> str:
        """One line."""
        seen = f"last seen at {self.where}, {self.silent_seconds:.0f} s ago"
        return f"rank {self.rank} on {self.host}: {seen}; {self.does}"


@dataclass(frozen=True)
class HangFiles:
    """The files of one start of a run, whose ranks are on ``hosts`` (one entry per rank)."""

    logs: Path
    start: str
    hosts: Sequence[str]

    @property
    def verdict(self) -> Path:
        """It exists once the run is to end."""
        return self.logs / f"hang-{self.start}.json"

    def stacks(self, rank: int) -> Path:
        """Where the stacks of a rank are kept."""
        return self.logs / f"stacks-{self.start}-rank-{rank}.txt"

    def report(self, report: Report) -> None:
        """Write the report of a rank, or replace it."""
        path = self._path(report.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        private = path.with_suffix(".new")
        private.write_text(json.dumps(asdict(report)), encoding="utf-8")
        private.replace(path)

    def withdraw(self, rank: int) -> None:
        """The rank is alive again."""
        self._path(rank).unlink(missing_ok=True)

    def reports(self) -> list[Report]:
        """Of all ranks that are silent, by rank."""
        found = []
        for path in self.verdict.with_suffix("").glob("rank-*.json"):
            try:
                found.append(Report(**json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:  # withdrawn meanwhile
                continue
        return sorted(found, key=lambda report: report.rank)

    def write_verdict(self, reports: Sequence[Report], job: str | None, restart: int) -> str | None:
        """Write the verdict and return its message; None where another rank was faster.

        To blame are the silent ranks that do not wait for others; where there is none, those that did not report.
        """
        blamed = {report.rank: report.host for report in reports if not report.is_waiting}
        if not blamed:
            known = {report.rank for report in reports}
            blamed = {rank: host for rank, host in enumerate(self.hosts) if rank not in known}
        message = self._message(reports, blamed)
        hung = [{"rank": rank, "host": host} for rank, host in sorted(blamed.items())]
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            with self.verdict.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "restart": restart, "hung": hung, "message": message}))
        except FileExistsError:
            return None
        return message

    def _path(self, rank: int) -> Path:
        return self.logs / f"hang-{self.start}" / f"rank-{rank}.json"

    def _message(self, reports: Sequence[Report], blamed: dict[int, str]) -> str:
        shown = [report.text for report in reports if report.rank in blamed]
        shown += [
            f"rank {rank} on {host}: no report, although the others wait for it; the host may be gone"
            for rank, host in blamed.items()
            if rank not in {report.rank for report in reports}
        ]
        if not blamed:
            shown = ["all ranks wait for each other, perhaps over a broken network", *(one.text for one in reports)]
        if len(shown) > _RANKS_SHOWN:
            shown = [*shown[:_RANKS_SHOWN], f"and {len(shown) - _RANKS_SHOWN} more"]
        end = (
            f"all ranks end with code {HUNG_EXIT_CODE}, and the same command resumes from the newest checkpoint; "
            f"stacks: {self.stacks(0).with_name(self.stacks(0).name.replace('rank-0', 'rank-*'))}"
        )
        return "\n  ".join(["the run hangs (train.hang_seconds):", *shown, end])


def verdict_of(logs: Path, job: str, restart: int) -> dict[str, Any] | None:
    """The verdict of one start of a Slurm job, or None."""
    verdicts = _verdicts(logs).values()
    return next((one for one in verdicts if (one["job"], one["restart"]) == (job, restart)), None)


def hung_twice(logs: Path, job: str) -> list[str]:
    """The hosts that were to blame in two starts of a Slurm job or more."""
    verdicts = _verdicts(logs).values()
    starts = Counter(host for one in verdicts if one["job"] == job for host in {entry["host"] for entry in one["hung"]})
    return sorted(host for host, times in starts.items() if times > 1)


def verdict_messages(logs: Path) -> dict[float, str]:
    """When each verdict was written, in seconds since 1970, and its message."""
    return {path.stat().st_mtime: verdict["message"] for path, verdict in _verdicts(logs).items()}


def _verdicts(logs: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(logs.glob("hang-*.json"))}
