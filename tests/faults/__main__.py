"""python -m tests.faults [--cycles 200] [--seed 0]: one random fault a cycle, and the matrix of what they did."""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from qvtune.console import console
from tests.faults.cycle import Faults
from tests.faults.kinds import draw
from tests.faults.matrix import show
from tests.support.forks import stop_server


def main() -> int:
    """0 where every cycle ended as the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=200, help="number of cycles; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="decides all faults; default %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first cycle, to repeat one")
    parser.add_argument("--only", metavar="KIND", help="leave out cycles with other kinds of faults")
    options = parser.parse_args()
    started, outcomes = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    say = partial(console().print, markup=False)
    say(f"seed {options.seed}, in {folder}")
    try:
        faults = Faults(folder)
        for number in range(options.first, options.first + options.cycles):
            fault = draw(options.seed, number, faults.counts, launcher=True)
            if options.only not in (None, fault.kind):
                continue
            outcome = faults.cycle(number, fault)
            outcomes.append(outcome)
            say(f"{time.monotonic() - started:6.0f} s  cycle {number}: {fault} {outcome.codes}")
            for problem in outcome.problems:
                say(f"  PROBLEM {problem}")
    finally:
        stop_server()
    show(outcomes, options.seed)
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
