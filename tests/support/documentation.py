"""The parts of launch/README.md that are made from the code: python -m tests.support.documentation writes them."""

import re
import subprocess
import sys
from functools import cache

from qvtune.config.settings import markdown
from tests.support.processes import REPOSITORY

COMMANDS_README = REPOSITORY / "launch" / "README.md"
_BLOCK = re.compile(r"(<!-- (help|settings) ?([\w ]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_generated_parts(text: str) -> str:
    """``text`` with what is between ``<!-- help NAME -->`` or ``<!-- settings -->`` and ``<!-- end -->`` made again."""

    def replaced(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        content = markdown() if kind == "settings" else f"```\n{_help_of(name)}```\n"
        return f"{start}{content}{end}"

    return _BLOCK.sub(replaced, text)


def names_of_generated_parts(text: str) -> list[str]:
    """``settings``, and the command of each help with its part (``study toy``), in order."""
    return [match[3] or match[2] for match in _BLOCK.finditer(text)]


@cache
def _help_of(command: str) -> str:
    name, *part = command.split()
    words = [sys.executable, str(REPOSITORY / "launch" / f"{name}.py"), *part, "--help"]
    environment = {"COLUMNS": "120", "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


if __name__ == "__main__":
    COMMANDS_README.write_text(with_generated_parts(COMMANDS_README.read_text()))
