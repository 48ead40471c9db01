#!/usr/bin/env python
"""Check that this machine, or each node of a Slurm job, is fit for a run.

Example:
  python launch/doctor.py --config launch/recipes/demo.yaml
  srun --ntasks-per-node=1 python launch/doctor.py --config RECIPE.yaml        (all nodes of a job)

Prints one table within 60 s.

Exit codes:
  0  go
  1  no-go; the table names the failed checks and the nodes at fault
  2  the recipe or the command line is wrong
"""

import argparse
import sys
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.console import command_parser
from qvtune.distributed.command import run_alone
from qvtune.system import heavy_imports


def main() -> int:
    """Parse the command line and examine."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="check its data, base and run folder, too")
    parser.add_argument("--nodes", type=int, metavar="N", help="expected number of nodes; default: the job's")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="expected GPUs per node; default: the job's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_intermixed_args()
    return run_alone(lambda: _examine(options))


def _examine(options: argparse.Namespace) -> None:
    run = None if options.config is None else load_config(options.config, options.overrides)
    with heavy_imports():
        from qvtune.doctor.examine import doctor  # torch: seconds
    doctor(run, options.nodes, options.gpus_per_node)


if __name__ == "__main__":
    sys.exit(main())
