"""Running a command on all ranks: one message for a person's mistake, one exit code, and everybody leaves together."""

import sys
from collections.abc import Callable

from qvtune.cluster import distributed
from qvtune.errors import UserError


def run_command(command: Callable[[], int]) -> int:
    """Start the process group, run ``command`` on every rank and return the exit code.

    A UserError is printed once, by rank 0, and gives exit code 2; it is raised on all ranks (``distributed.together``).
    Any other exception ends this rank with a traceback, without collectives: the launcher ends the others.
    """
    distributed.start()
    try:
        code = command()
    except UserError as error:
        if distributed.is_main():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        code = error.exit_code
    distributed.stop()
    return code
