"""Make the report of a run again, compare several runs, or send a run to a tracker.

Example:
  python -m qvtune.report runs/demo                           (writes runs/demo/report.html)
  python -m qvtune.report runs/a runs/b --output both.html    (compares them)
  python -m qvtune.report runs/demo --send mlflow             (sends what it does not have yet)

Every run writes its report by itself, and sends its numbers to the trackers of report.trackers. Pages can be made
again at any time, also while the run goes on.

Exit codes:
  0      the page is written, or everything is sent
  2      a folder is none of a run, or the tracker has not taken everything
"""

import sys
import threading
from pathlib import Path
from typing import get_args

from qvtune.config.report import ReportSection, TrackerName
from qvtune.console import command_parser, console
from qvtune.distributed.command import run_alone
from qvtune.errors import UserError


def main() -> int:
    """Parse the command line and do what it says."""
    parser = command_parser(__doc__, "python -m qvtune.report")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="RUN/report.html; of several comparison.html")
    parser.add_argument("--send", choices=get_args(TrackerName), help="write no page, but send the runs to a tracker")
    options = parser.parse_args()
    if options.send is not None:
        return run_alone(lambda: _send(options.runs, options.send))
    return run_alone(lambda: _write(options.runs, options.output))


def _write(runs: list[Path], output: Path | None) -> None:
    from qvtune.report.compare_page import compare_page
    from qvtune.report.run_page import REPORT, run_page, write_page
    from qvtune.report.run_record import read_runs

    records = read_runs(runs)
    page = run_page(records[0]) if len(records) == 1 else compare_page(records)
    default = runs[0] / REPORT if len(records) == 1 else Path("comparison.html")
    console().print(str(write_page(page, output or default)), markup=False, soft_wrap=True)


def _send(runs: list[Path], tracker: TrackerName) -> None:
    from qvtune.report.run_record import read_settings, require_run
    from qvtune.report.send import Sender, keep_sending
    from qvtune.report.trackers.tracker import require_trackers

    require_trackers(ReportSection(trackers=(tracker,)))
    at_once = threading.Event()
    at_once.set()
    for run in runs:
        require_run(run)
        project = read_settings(run).get("report", {}).get("project", ReportSection().project)
        problems: list[str] = []
        if not keep_sending(Sender(tracker, run, project, waits=False), at_once, problems.append):
            raise UserError(f"{run}: {tracker} has not taken everything ({problems[0]}); try again")
        console().print(f"{run}: {tracker} has everything", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
