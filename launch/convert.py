#!/usr/bin/env python
"""Merge a trained adapter into its base:  python launch/convert.py runs/demo/checkpoints/latest --output merged/

Writes one ordinary Hugging Face folder, and only if it computes what base and adapter compute (merge_report.json);
or, with --format, the adapter alone for PEFT, a merged folder in 4 bits, or a file for llama.cpp.
Started again after it was cut off (killed, a full disk) with the same arguments, it goes on where it was.
Exit codes: 0 written and proved; 1 the proof failed, nothing was written; 2 the input is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from qvtune.convert.convert import DEFAULT_SHARD_BYTES, BaseChoice, DtypeChoice, convert
from qvtune.convert.formats import FormatName
from qvtune.distributed.command import run_alone


def main() -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="INPUT", help="checkpoint, run folder, PEFT adapter or DeepSpeed ZeRO folder"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the merged model")
    parser.add_argument(
        "--format", choices=get_args(FormatName), default="merged", help="what DIR is to hold; default %(default)s"
    )
    parser.add_argument(
        "--base-weights",
        choices=get_args(BaseChoice),
        help="dequantized = the values that training saw (default for NF4 runs); original = the base's own",
    )
    parser.add_argument(
        "--dtype", choices=get_args(DtypeChoice), default="auto", help="auto = training's, or the base's"
    )
    parser.add_argument(
        "--max-shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, metavar="N", help="of a file; %(default)s"
    )
    parser.add_argument("--proof-rows", type=int, metavar="N", help="evaluation rows in the proof; 8 if there are")
    parser.add_argument("--num-threads", type=int, metavar="N", help="tensors at a time; as many as there are cores")
    parser.add_argument("--base", metavar="FOLDER_OR_ID", help="the base, where it is not (any more) where INPUT says")
    parser.add_argument("--allow-pickle", action="store_true", help="open .bin and DeepSpeed's .pt, as tensors only")
    options = vars(parser.parse_args())
    return run_alone(lambda: convert(**options))


if __name__ == "__main__":
    sys.exit(main())
