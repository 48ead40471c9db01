"""Time, memory and size of report.html for a run of a million steps: python -m tests.benchmarks.report

The run's metrics are synthetic: an evaluation, and a checkpoint with the norms of 30 layers, every 1,000 steps; killed
and resumed once. Memory is that of a process that does nothing else, as the one that follows a run.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from qvtune.console import console
from tests.report.runs import events, write_run

_CODE = """
import resource, sys, time
from pathlib import Path
started = time.monotonic()
from qvtune.report.history import read_history
from qvtune.report.run_page import write_report
imported = time.monotonic()
history = read_history(Path(sys.argv[1]))
read = time.monotonic()
page = write_report(Path(sys.argv[1]), history)
written = time.monotonic()
cpu = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(imported - started, read - imported, written - read, cpu, peak, page.stat().st_size / 1e6)
"""


def main() -> None:
    """Make a run of each length, build its report in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="lengths of the runs")
    columns = [
        "steps",
        "metrics.jsonl, MB",
        "imports, s",
        "reading, s",
        "page, s",
        "CPU time, s",
        "peak memory, MB",
        "report.html, MB",
    ]
    table = Table(*columns)
    for num_steps in parser.parse_args().steps:
        with tempfile.TemporaryDirectory() as folder:
            half = num_steps // 2
            starts = events(half + 500, every=1000, is_complete=False), events(num_steps, half, every=1000)
            run_dir = write_run(Path(folder) / "run", *starts)
            size = (run_dir / "metrics.jsonl").stat().st_size / 1e6
            words = [sys.executable, "-c", _CODE, str(run_dir)]
            found = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        table.add_row(f"{num_steps:,}", f"{size:.1f}", *(f"{float(value):.2f}" for value in found))
    console().print(table)


if __name__ == "__main__":
    main()
