#!/usr/bin/env python
"""Quantize a base once:  python launch/quantize.py BASE --output DIR

BASE is a model folder, a hub id or `demo`; DIR becomes an ordinary 4-bit folder for model.name_or_path, of which each
rank reads its own bytes only. Started again after it was killed, it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from qvtune.distributed.command import run_alone
from qvtune.model.quantize import DEFAULT_SHARD_BYTES, quantize
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir


def main() -> int:
    """Parse the command line and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--no-double-quant", action="store_true", help="leave the block statistics in float32")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, metavar="N", help="of a file; %(default)s"
    )
    options = parser.parse_args()
    return run_alone(
        lambda: quantize(
            model_folder(options.base, cache_dir()),
            options.output,
            double_quant=not options.no_double_quant,
            max_shard_bytes=options.max_shard_bytes,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
