#!/usr/bin/env python
"""Repeat arXiv 2410.02247 and judge its claims.

Example:
  python launch/study.py toy --output studies/toy

`python launch/study.py COMMAND --help` explains a command.

Exit codes:
  0  done
  2  the command line or a file is wrong; nothing was written
"""

import argparse
import sys
from pathlib import Path

from qvtune.console import command_parser, positive
from qvtune.distributed.command import run_alone
from qvtune.system import heavy_imports

TOY = """Simulate Theorem 2 in a toy model of width n: the rates at which learning is efficient as n grows.

Example:
  python launch/study.py toy --output studies/toy

Widths 2^6 to 2^14, eta_QK and eta_V as powers of n, gradient descent as in the theorem and Adam beside it. Writes
toy.csv (scaling exponents of the three deltas with 95 % intervals) and toy.svg. The toy model is a reconstruction:
that of LoRA+, which has the theorem's three deltas.

Exit codes:
  0  simulated
  2  the command line is wrong; nothing was written
"""


def main() -> int:
    """Parse the command line and run a command."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help="one of:", parser_class=command_parser)
    toy = commands.add_parser("toy", help="Theorem 2 by simulation", documentation=TOY)
    toy.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for toy.csv and toy.svg")
    toy.add_argument("--seeds", type=positive, default=2000, metavar="N", help="draws per width; default %(default)s")
    toy.set_defaults(run=_toy)
    options = parser.parse_args()
    return run_alone(lambda: options.run(options))


def _toy(options: argparse.Namespace) -> None:
    with heavy_imports():
        from qvtune.study.toy_report import toy
    toy(options.output, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
