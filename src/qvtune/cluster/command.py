"""Running a command: one message for a person's mistake, one exit code, and on many ranks everybody leaves together."""

import sys
from collections.abc import Callable

from qvtune.cluster import distributed
from qvtune.errors import StopRequested, UserError


def run_command(command: Callable[[], int]) -> int:
    """Start the process group, run ``command`` on every rank and return the exit code.

    A UserError is printed once, by rank 0, and gives exit code 2; it is raised on all ranks (``distributed.together``).
    So is a StopRequested, which comes before there was anything to save, and gives 75. Any other exception ends this
    rank with a traceback, without collectives: the launcher ends the others.
    """
    try:
        distributed.start()
        code = command()
    except UserError as error:
        if distributed.is_main():
            _print(error)
        code = error.exit_code
    except StopRequested as request:
        if distributed.is_main():
            sys.stderr.write(f"{request} before the first step; there was nothing to save: start again\n")
        code = request.exit_code
    distributed.stop()
    return code


def run_alone(command: Callable[[], object]) -> int:
    """Run ``command`` without a process group; 0, or the exit code of its UserError, which is printed."""
    distributed.silence_others()
    try:
        command()
    except UserError as error:
        _print(error)
        return error.exit_code
    return 0


def _print(error: UserError) -> None:
    for problem in error.problems:
        sys.stderr.write(f"error: {problem}\n")
