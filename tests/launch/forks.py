"""A Python script run many times with other arguments: python -m tests.launch.forks SCRIPT.py CASES.json FOLDER

What takes ten seconds to import is imported once; each case then is a fork that runs the script as its ``__main__``.
CASES.json maps a name to arguments; FOLDER gets NAME.out, NAME.err and codes.json.
"""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import peft
import transformers

from qvtune.model import nf4
from qvtune.train import loop

WARM = (deepspeed, peft, transformers.AutoModelForCausalLM, transformers.AutoTokenizer, nf4, loop)


def run_forked(script: Path, arguments: Sequence[str], out: Path, err: Path) -> int:
    """The exit code of the script, whose standard output and error go to two files."""
    child = os.fork()
    if child == 0:
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        sys.exit()  # here, or with the script's SystemExit or error, the fork ends as any interpreter does
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Run all cases."""
    script, cases, folder = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    codes = {
        name: run_forked(script, arguments, folder / f"{name}.out", folder / f"{name}.err")
        for name, arguments in cases.items()
    }
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
