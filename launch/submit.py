#!/usr/bin/env python
"""Hand a run to Slurm:  python launch/submit.py --nodes 4 --gpus-per-node 8 --config RECIPE [section.key=value ...]

Checks what launch/train.py would, freezes code and configuration in run_dir/submitted, and submits slurm/train.sbatch.
Type it in the folder that the recipe's relative paths start from. Exit codes: 0 submitted; 2 something is wrong.
"""

import argparse
import sys
from pathlib import Path

from qvtune.distributed.command import run_alone
from qvtune.submit.submit import Request, submit


def main() -> int:
    """Parse the command line and submit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G")
    parser.add_argument("--procs-per-node", type=int, metavar="P", help="ranks on CPUs, instead of one for each GPU")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--time", metavar="LIMIT", help="as sbatch takes it; the run is chained over the limit")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="e.g. --sbatch=--exclude=n3; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and show the command; write and submit nothing")
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_intermixed_args()
    return run_alone(lambda: submit(Request(**vars(options))))


if __name__ == "__main__":
    sys.exit(main())
