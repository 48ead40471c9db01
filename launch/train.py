#!/usr/bin/env python
"""Fine-tune a model.

Example:
  deepspeed --num_gpus 2 launch/train.py --config launch/recipes/demo.yaml optimizer.lr_multipliers.v=4
  python launch/train.py --config launch/recipes/demo.yaml --show-batch        (look at the data, train nothing)

Also runs under torchrun, under srun, and with plain python as one process. Settings: --settings.

Exit codes:
  0      the run is complete, or what was asked for has been shown
  2      the configuration or the data is wrong; nothing was written
  75     stopped on request after a complete checkpoint; the same command resumes
  76     a rank hung (train.hang_seconds) and all were ended; the same command resumes
  other  a failure
"""

import argparse
import sys
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.config.settings import show_settings
from qvtune.console import command_parser, positive
from qvtune.distributed.command import run_alone, run_command, run_on_rank_0
from qvtune.system import heavy_imports


def main() -> int:
    """Parse the command line, check the configuration and train."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, metavar="RECIPE.yaml", help="the settings of the run; required")
    parser.add_argument("--settings", nargs="?", const="", metavar="SECTION", help="print all settings, or a section's")
    parser.add_argument("--show-batch", nargs="?", const=2, type=positive, metavar="N", help="N rows (2), statistics")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK is read
    options = parser.parse_intermixed_args()
    if options.settings is not None:
        return run_alone(lambda: show_settings(options.settings))
    if options.config is None:
        parser.error("--config RECIPE.yaml is required")
    if options.show_batch is not None:
        return run_on_rank_0(lambda: _show_batch(load_config(options.config, options.overrides), options.show_batch))
    return run_command(lambda: load_config(options.config, options.overrides), _train)


def _train(config: RunConfig) -> int:
    with heavy_imports():
        from qvtune.train.loop import train  # torch, transformers and PEFT: seconds
    return train(config)


def _show_batch(config: RunConfig, num_rows: int) -> None:
    with heavy_imports():
        from qvtune.train.show_batch import show_batch  # as above
    show_batch(config, num_rows)


if __name__ == "__main__":
    sys.exit(main())
