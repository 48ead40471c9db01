#!/usr/bin/env python
"""Submit a run to Slurm.

Example:
  python launch/submit.py --nodes 4 --gpus-per-node 8 --config launch/recipes/llama3_8b_qv.yaml

Checks what launch/train.py checks, copies code and configuration into run_dir/submitted, and submits
slurm/train.sbatch. Relative paths in the recipe start from the folder in which this is typed.

Exit codes:
  0  submitted, or with --dry-run: could be
  2  the recipe, the command line or this machine is wrong; nothing was submitted
"""

import sys
from pathlib import Path

from qvtune.console import command_parser
from qvtune.distributed.command import run_alone
from qvtune.plan.gpus import GPUS
from qvtune.submit.submit import Request, submit


def main() -> int:
    """Parse the command line and submit."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE.yaml", help="the settings of the run")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs per node; one rank for each")
    parser.add_argument("--procs-per-node", type=int, metavar="P", help="ranks per node on CPUs, instead of GPUs")
    parser.add_argument("--partition", metavar="NAME", help="Slurm's partition; default: the cluster's")
    parser.add_argument("--time", metavar="LIMIT", help="as sbatch takes it; a longer run is continued by requeueing")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="e.g. --sbatch=--exclude=n3; repeatable"
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), metavar="NAME", help="estimate memory and time, as plan.py does")
    parser.add_argument("--dry-run", action="store_true", help="check, and show the command; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_intermixed_args()
    return run_alone(lambda: submit(Request(**vars(options))))


if __name__ == "__main__":
    sys.exit(main())
