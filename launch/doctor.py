#!/usr/bin/env python
"""Is this machine, or each node of this job, fit for a run?  python launch/doctor.py [--config RECIPE.yaml]

On all nodes of a job:  srun --ntasks-per-node=1 python launch/doctor.py --config RECIPE.yaml [section.key=value ...]
One table within 60 s. Exit codes: 0 go; 1 no-go (the node to blame is named); 2 wrong arguments.
"""

import argparse
import sys
from pathlib import Path

from qvtune.distributed.command import run_alone
from qvtune.doctor.examine import doctor


def main() -> int:
    """Parse the command line and examine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="look at its data, base and run folder too")
    parser.add_argument("--nodes", type=int, metavar="N", help="expected; by default what the job has")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="expected; by default what the job asks for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_intermixed_args()
    return run_alone(lambda: doctor(options.config, options.overrides, options.nodes, options.gpus_per_node))


if __name__ == "__main__":
    sys.exit(main())
