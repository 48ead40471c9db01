#!/usr/bin/env python
"""Fine-tune a model:  deepspeed launch/train.py --config launch/recipes/demo.yaml [section.key=value ...]

Runs as well under torchrun, srun and, as one process, plain python.
"""

import argparse
import sys
from pathlib import Path

from qvtune.distributed.command import run_command
from qvtune.train.loop import train_from_file


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # added by the deepspeed launcher; LOCAL_RANK says it too
    arguments = parser.parse_intermixed_args()
    return run_command(lambda: train_from_file(arguments.config, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main())
