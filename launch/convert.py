#!/usr/bin/env python
"""Merge a trained adapter into its base model, and prove that the result computes the same.

Example:
  python launch/convert.py runs/demo/checkpoints/latest --output merged/

Writes one ordinary Hugging Face folder, and only if it computes what base and adapter compute (merge_report.json); or,
with --format, the adapter alone for PEFT, a merged folder in 4 bits, or a file for llama.cpp. If it was interrupted
(killed, a full disk), the same command resumes. --check-with also compares the tokens that a reader of DIR generates.

Exit codes:
  0  written and proved
  1  the proof failed, or the reader of --check-with differs; nothing was written
  2  the input or the command line is wrong
"""

import sys
from pathlib import Path
from typing import Any, get_args

from qvtune.config.outputs import MERGED_SHARD_BYTES, BaseChoice, DtypeChoice, FormatName, ReaderName
from qvtune.console import command_parser
from qvtune.convert.readers import require_reader
from qvtune.convert.sources.kinds import require_source
from qvtune.distributed.command import run_alone
from qvtune.errors import Problems
from qvtune.system import heavy_imports


def main() -> int:
    """Parse the command line and convert."""
    parser = command_parser(__doc__)
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
        "--max-shard-bytes", type=int, default=MERGED_SHARD_BYTES, metavar="N", help="bytes per file; %(default)s"
    )
    parser.add_argument("--proof-rows", type=int, metavar="N", help="evaluation rows in the proof; default up to 8")
    parser.add_argument("--num-threads", type=int, metavar="N", help="tensors in parallel; default number of cores")
    parser.add_argument("--base", metavar="FOLDER_OR_ID", help="the base model, if it is not where INPUT says")
    parser.add_argument("--allow-pickle", action="store_true", help="open .bin and DeepSpeed's .pt, as tensors only")
    parser.add_argument(
        "--check-with", choices=get_args(ReaderName), help="read DIR with it, and compare greedy tokens"
    )
    options = vars(parser.parse_args())
    return run_alone(lambda: _convert(options))


def _convert(options: dict[str, Any]) -> None:
    problems = Problems()
    problems.attempt(lambda: require_source(options["source"]))
    if options["check_with"] is not None:
        problems.attempt(lambda: require_reader(options["check_with"], options["format"]))
    problems.raise_all()
    with heavy_imports():
        from qvtune.convert.convert import convert  # torch: seconds
    convert(**options)


if __name__ == "__main__":
    sys.exit(main())
