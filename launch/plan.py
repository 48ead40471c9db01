#!/usr/bin/env python
"""Estimate what a run needs and takes on rented GPUs, before any is rented.

Example:
  python launch/plan.py --config launch/recipes/llama3_8b_qv.yaml --nodes 1 --gpus-per-node 8 --gpu h100-80

Prints the memory of a GPU by cause and whether it fits, bytes gathered and over which links, seconds of a step, hours,
and the fastest configuration that fits. Of the base only config.json is needed; no GPU, no weights, no network.

Exit codes:
  0  planned, also where nothing fits
  2  the recipe or the command line is wrong
"""

import argparse
import sys
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.console import command_parser, positive
from qvtune.distributed.command import run_alone
from qvtune.plan.gpus import GPUS
from qvtune.system import heavy_imports


def main() -> int:
    """Parse the command line and plan."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE.yaml", help="the settings of the run")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="number of nodes; default %(default)s")
    parser.add_argument("--gpus-per-node", type=positive, required=True, metavar="G", help="GPUs per node")
    parser.add_argument("--gpu", required=True, choices=tuple(GPUS), metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--nics-per-node", type=positive, metavar="K", help="network adapters; default one per GPU")
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="tokens of the training data, if not tokenized here"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_intermixed_args()
    return run_alone(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> None:
    run = load_config(options.config, options.overrides)
    with heavy_imports():
        from qvtune.plan.plan import Request, plan
    request = Request(options.nodes, options.gpus_per_node, options.gpu, options.nics_per_node, options.tokens)
    plan(run, request, [str(options.config), *options.overrides])


if __name__ == "__main__":
    sys.exit(main())
