"""Running a command: one message for a person's mistake, one exit code, and on many ranks everybody leaves together."""

import sys
from collections.abc import Callable

from qvtune.cluster import distributed
from qvtune.errors import UserError


def run_command(command: Callable[[], int]) -> int:
    """Start the process group, run ``command`` on every rank and return the exit code.

    A UserError is printed once, by rank 0, and gives exit code 2; it is raised on all ranks (``distributed.together``).
    Any other exception ends this rank with a traceback, without collectives: the launcher ends the others.
    """
    try:
        distributed.start()
        code = command()
    except UserError as error:
        if distributed.is_main():
            _print(error)
        code = error.exit_code
    distributed.stop()
    return code


def run_alone(command: Callable[[], object]) -> int:
    """Run ``command`` without a process group; 0, or the exit code of its UserError, which is printed."""
    try:
        command()
    except UserError as error:
        _print(error)
        return error.exit_code
    return 0


def _print(error: UserError) -> None:
    for problem in error.problems:
        sys.stderr.write(f"error: {problem}\n")
