"""What all commands share on the console: where they print, and how their --help is laid out."""

import argparse
import os

from rich.console import Console


def console() -> Console:
    """Standard output. Without a terminal (a log file) lines are 160 characters wide, so that they are not folded."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=int(os.environ.get("COLUMNS", "160")))


def command_parser(documentation: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command in launch/, whose module docstring is its --help; or of a part of a command, ``prog``.

    The docstring is one line of purpose, ``Example:``, notes, and ``Exit codes:`` at the end. Arguments and options are
    shown between the notes and the exit codes.
    """
    description, title, codes = documentation.partition("Exit codes:")
    assert codes, "the docstring of a command ends with its exit codes"
    return argparse.ArgumentParser(
        prog,
        description=description.strip(),
        epilog=(title + codes).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """Type of an option that is a whole number > 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number > 0; where something else follows the option, write --OPTION=N"
        )
    return int(text)
