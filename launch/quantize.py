#!/usr/bin/env python
"""Quantize a base model to NF4 once, so that every later start reads a quarter of the bytes.

Example:
  python launch/quantize.py meta-llama/Llama-3.1-8B --output models/Llama-3.1-8B-nf4

The output is an ordinary folder in bitsandbytes' 4-bit format, for model.name_or_path; each rank then reads only its
own part. If it was interrupted, the same command resumes.

Exit codes:
  0  written
  2  the base or the command line is wrong
"""

import argparse
import sys
from pathlib import Path

from qvtune.config.outputs import NF4_SHARD_BYTES
from qvtune.console import command_parser
from qvtune.distributed.command import run_alone
from qvtune.errors import naming_setting
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from qvtune.system import heavy_imports


def main() -> int:
    """Parse the command line and quantize."""
    parser = command_parser(__doc__)
    parser.add_argument("base", metavar="BASE", help="a model folder, a hub id or `demo`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the block statistics in float32")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=NF4_SHARD_BYTES, metavar="N", help="bytes per file; default %(default)s"
    )
    options = parser.parse_args()
    return run_alone(lambda: _quantize(options))


def _quantize(options: argparse.Namespace) -> None:
    with naming_setting("BASE"):
        folder = model_folder(options.base, cache_dir())
    with heavy_imports():
        from qvtune.model.quantize import quantize  # torch and bitsandbytes: seconds
    quantize(folder, options.output, double_quant=not options.no_double_quant, max_shard_bytes=options.max_shard_bytes)


if __name__ == "__main__":
    sys.exit(main())
