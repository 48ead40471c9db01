"""The console that all commands print to."""

import os

from rich.console import Console


def console() -> Console:
    """Standard output; log files get lines wide enough not to be folded."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=int(os.environ.get("COLUMNS", "160")))
