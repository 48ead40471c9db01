"""Runs a command: prints a UserError once and turns the outcome into an exit code that all ranks share."""

import sys
from collections.abc import Callable

from qvtune.distributed import process_group
from qvtune.errors import StopRequested, UserError


def run_command(command: Callable[[], int]) -> int:
    """Start the process group, run ``command`` on every rank and return the exit code.

    A UserError is raised on all ranks (``process_group.raise_on_all_ranks``), printed once, by rank 0, and gives exit
    code 2. A StopRequested gets here only if there was nothing to save yet; it is raised on all ranks too and gives
    75. Any other exception ends this rank with a traceback, without collectives: the launcher ends the others.
    """
    try:
        process_group.start()
        code = command()
    except UserError as error:
        if process_group.is_main():
            _print(error)
        code = error.exit_code
    except StopRequested as request:
        if process_group.is_main():
            sys.stderr.write(f"{request} before the first step; there was nothing to save: start again\n")
        code = request.exit_code
    process_group.stop()
    return code


def run_alone(command: Callable[[], object]) -> int:
    """Run ``command`` without a process group; 0, or the exit code of its UserError, which is printed."""
    process_group.silence_others()
    try:
        command()
    except UserError as error:
        _print(error)
        return error.exit_code
    return 0


def _print(error: UserError) -> None:
    for problem in error.problems:
        sys.stderr.write(f"error: {problem}\n")
