"""Make the report of a run again, or compare several runs.

Example:
  python -m qvtune.report runs/demo                           (writes runs/demo/report.html)
  python -m qvtune.report runs/a runs/b --output both.html    (compares them)

Every run writes its report by itself. It can be made again at any time, also while the run goes on.

Exit codes:
  0      the page is written
  2      a folder is none of a run
"""

import sys
from pathlib import Path

from qvtune.console import command_parser, console
from qvtune.distributed.command import run_alone


def main() -> int:
    """Parse the command line and write the page."""
    parser = command_parser(__doc__, "python -m qvtune.report")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="RUN/report.html; of several comparison.html")
    options = parser.parse_args()
    return run_alone(lambda: _write(options.runs, options.output))


def _write(runs: list[Path], output: Path | None) -> None:
    from qvtune.report.compare_page import compare_page
    from qvtune.report.run_page import REPORT, run_page, write_page
    from qvtune.report.run_record import read_runs

    records = read_runs(runs)
    page = run_page(records[0]) if len(records) == 1 else compare_page(records)
    default = runs[0] / REPORT if len(records) == 1 else Path("comparison.html")
    console().print(str(write_page(page, output or default)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
