"""The section of a run's report about its starts and what went wrong."""

import time

from qvtune.report.chart import Span, lanes_chart
from qvtune.report.page import Figure, Section, Table, Value
from qvtune.report.run_record import RunRecord, duration
from qvtune.report.run_sections import MAX_ROWS, run_seconds, section

_HOUR, _MINUTE = 3600.0, 60.0
_LANES = {  # event -> lane, and the field with its seconds
    "eval": ("evaluation", "seconds"),
    "generation": ("generation", "seconds"),
    "checkpoint": ("checkpoints", "blocked_seconds"),
}


def starts_and_faults(run: RunRecord) -> Section:
    """A time line, and tables of the starts and of the faults."""
    history = run.history
    if not history.starts:
        return Section("Starts and faults", [])
    again = None
    if history.num_repeated:
        again = f"{history.num_repeated:,} steps were run again after a resume ({duration(history.repeated_seconds)})."
    return section("Starts and faults", [_time_line(run), again, _starts(run), _faults_table(run)])


def _time_line(run: RunRecord) -> Figure | None:
    history = run.history
    origin = history.starts[0].begin["time"]
    unit, name = (_HOUR, "hours") if run_seconds(history) > 2 * _HOUR else (_MINUTE, "minutes")

    def span(start: float, end: float, note: str, *, is_fault: bool = False) -> Span:
        return Span((start - origin) / unit, (end - origin) / unit, note, is_fault)

    lanes = {
        "training": [
            span(start.begin["time"], start.last_time, f"start {n}: step {start.begin['step']} to {start.last_step}")
            for n, start in enumerate(history.starts, 1)
        ]
    }
    for event, (lane, field) in _LANES.items():
        lanes[lane] = [
            span(entry["time"] - entry.get(field, 0.0), entry["time"], f"step {entry['step']}: {event}")
            for entry in history.of(event)
        ]
    lanes["faults"] = [span(when, when, what, is_fault=True) for when, what in _faults(run)]
    caption = "What happened when; notes are shown under the pointer."
    shown = [(lane, spans) for lane, spans in lanes.items() if spans]
    return lanes_chart("starts", caption, shown, f"{name} since the first start")


def _faults(run: RunRecord) -> list[tuple[float, str]]:
    """When, in seconds since 1970, and what."""
    history = run.history
    found = [
        (entry["time"], f"step {entry['step']} was not saved: {entry['problem']}")
        for entry in history.of("save_failed")
    ]
    for number, start in enumerate(history.starts, 1):
        if names := start.begin.get("damaged_checkpoints"):
            found.append((start.begin["time"], f"damaged checkpoints were set aside: {', '.join(names)}"))
        if start.end is None and not _may_run(run, number):
            how = f"failed: {start.error}" if start.error else "ended without run_end"
            found.append((start.last_time, f"start {number}, after step {start.last_step}: {how}"))
    first = history.starts[0].begin["time"]  # logs/ stays when an earlier run is moved aside
    found += [(when, message) for when, message in run.hangs.items() if when >= first]
    return sorted(found)


def _may_run(run: RunRecord, number: int) -> bool:
    """Whether the start, by its number from 1, may not have ended."""
    starts = run.history.starts
    return number == len(starts) and not starts[-1].error and run.is_alive is not False


def _starts(run: RunRecord) -> Table:
    rows = []
    for number, start in enumerate(run.history.starts, 1):
        begin = start.begin
        failed = "failed" if start.error else "without run_end"
        how: str | Value = start.end["reason"] if start.end is not None else Value(failed, mark="failed")
        if start.end is None and _may_run(run, number):
            how = "running" if run.is_alive else "running?"
        steps = f"{begin['step']:,} to {start.last_step:,}"
        ranks, took = str(begin.get("world_size", "")), duration(start.total_seconds)
        rows.append([str(number), _clock(begin["time"]), ranks, steps, took, how])
    title = "Starts" if len(rows) <= MAX_ROWS else f"The last {MAX_ROWS} of {len(rows)} starts"
    return Table(title, ["start", "time (UTC)", "ranks", "steps", "took", "ended"], rows[-MAX_ROWS:], num_labels=2)


def _faults_table(run: RunRecord) -> Table | None:
    rows = [[_clock(when), what] for when, what in _faults(run)]
    title = "Faults" if len(rows) <= MAX_ROWS else f"The last {MAX_ROWS} of {len(rows)} faults"
    return Table(title, ["time (UTC)", "what"], rows[-MAX_ROWS:], num_labels=2) if rows else None


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
