#!/usr/bin/env python
"""Repeat arXiv 2410.02247 and judge its claims.

Example:
  python launch/study.py grid GRID.yaml
  python launch/study.py toy --output studies/toy
  python launch/study.py bounds launch/recipes/glue_sst2.yaml
  python launch/study.py table studies/glue
  python launch/study.py suggest launch/recipes/glue_sst2.yaml --budget 17 --output studies/sst2
  python launch/study.py attention studies/glue/cells/CELL

`python launch/study.py COMMAND --help` explains a command.

Exit codes:
  0   done
  1   grid: cells have failed, all others are complete
  2   the command line or a file is wrong; nothing was written
  75  grid, suggest: stopped on request; the same command resumes
"""

import argparse
import re
import sys
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.console import command_parser, positive
from qvtune.convert.sources.kinds import require_source
from qvtune.distributed.command import run_alone
from qvtune.study.cell import read_cells
from qvtune.study.extra import require_extra
from qvtune.study.run import train_grid
from qvtune.study.submit import ArrayRequest, submit_grid
from qvtune.system import heavy_imports

GRID = """Train the runs of a grid: projections x method x rank x lambda x learning rate x seed x task.

Example:
  python launch/study.py grid GRID.yaml
  python launch/study.py grid GRID.yaml --submit 4 --sbatch=--gpus-per-node=8
  python launch/study.py grid GRID.yaml --workers 4 train.max_steps=100 run_dir=studies/short

Each cell of the grid is a run in STUDY/cells/NAME, as launch/train.py makes it; STUDY is run_dir of the grid or of its
recipe. Workers train one cell after another. The same command resumes; cells that have failed are tried again.
GRID.yaml: launch/README.md.

Exit codes:
  0   all cells are complete, or with --submit: submitted
  1   cells have failed, which failed.txt in their folders explains; all others are complete
  2   the grid, its recipe or the command line is wrong; nothing was trained
  75  stopped on request; the same command resumes
"""

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

BOUNDS = """Compute Theorem 1, a bound on the generalization error, for a recipe and its data.

Example:
  python launch/study.py bounds launch/recipes/llama3_8b_qv.yaml --rows 100000 model.name_or_path=MODEL
  python launch/study.py bounds runs/mine/config.yaml --run runs/mine

In the paper's form and by the number of trained parameters, for the recipe's projections, for q and v, and for q, k and
v; with the word vacuous where it says nothing. Of the base only config.json is needed.

Exit codes:
  0  computed
  2  the recipe, the data or the command line is wrong
"""

TABLE = """Write the tables and figures of a study into its folder: report.html, report.md, tables/*.csv, figures/*.

Example:
  python launch/study.py table studies/glue
  python launch/study.py table studies/glue --target-loss 0.4
  python launch/study.py table studies/glue --target-loss sst2=0.25 --target-loss mrpc=0.5

From the folders of its cells alone, whatever their state: failed cells are shown with their reason, others as missing.
The same folder gives the same bytes. Results in the layout of the paper's Table 2, lambda against lambda = 1 with
intervals, projections at equal rank and equal parameter count, heat maps of both rates, speed, forgetting.

Exit codes:
  0  written
  2  the folder is no study, or the command line is wrong; nothing was written
"""

SUGGEST = """Recommend eta_QK and eta_V for a recipe, from short complete runs on its data.

Example:
  python launch/study.py suggest launch/recipes/llama3_8b_qv.yaml --budget 10% --output studies/rates
  python launch/study.py suggest launch/recipes/glue_sst2.yaml --budget 17 --output studies/sst2

The best setting with lambda = 1 and the best one with another lambda are compared over the rows of data.eval and over
seeds. The verdict: recommended; no difference, so lambda = 1; not decided, needs more seeds; or edge of the box. Writes
verdict.json, search.svg and suggestion.yaml, a recipe. The same command resumes, with a larger budget as well.

Exit codes:
  0   there is a verdict
  2   the recipe or the command line is wrong, the budget is too small, or runs failed that the verdict needs
  75  stopped on request; the same command resumes
"""

ATTENTION = """Measure how training has changed the attention of runs: entropy, and divergence from the base's.

Example:
  python launch/study.py attention studies/glue/cells/qv_ratio4_seed0 studies/glue/cells/qkv_ratio1_seed0

Writes attention.csv into each run's folder, by layer and head; `study.py table` shows what is there, side by side. The
newest checkpoint is compared with its base on the run's evaluation rows, both in this process, in float32.

Exit codes:
  0  measured
  2  a run has no checkpoint, or the command line is wrong; nothing was written
"""


def main() -> int:
    """Parse the command line and run a command."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help="one of:", parser_class=command_parser)
    grid = commands.add_parser("grid", help="train the runs of a grid", documentation=GRID)
    grid.add_argument("grid", type=Path, metavar="GRID.yaml", help="the recipe, and what its cells change")
    grid.add_argument("--workers", type=positive, metavar="N", help="cells at a time; default: one per GPU or CPU core")
    grid.add_argument(
        "--ranks-per-cell", type=positive, default=1, metavar="R", help="ranks that train a cell; default %(default)s"
    )
    grid.add_argument("--submit", type=positive, metavar="N", help="train on N nodes: a Slurm job array of N tasks")
    grid.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="e.g. --sbatch=--gpus-per-node=8; repeatable"
    )
    grid.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the recipe's"
    )
    grid.set_defaults(execute=_grid)
    toy = commands.add_parser("toy", help="Theorem 2 by simulation", documentation=TOY)
    toy.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for toy.csv and toy.svg")
    toy.add_argument("--seeds", type=positive, default=2000, metavar="N", help="draws per width; default %(default)s")
    toy.set_defaults(execute=_toy)
    bounds = commands.add_parser("bounds", help="Theorem 1 for a recipe, beside measured gaps", documentation=BOUNDS)
    bounds.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the settings of a run")
    bounds.add_argument("--rows", type=positive, metavar="N", help="training rows; default: data.train is read")
    bounds.add_argument("--bits", type=positive, default=32, metavar="Q", help="bits a parameter; default %(default)s")
    bounds.add_argument("--run", type=Path, metavar="RUN_DIR", help="show the gaps that this run has measured")
    bounds.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the recipe's"
    )
    bounds.set_defaults(execute=_bounds)
    table = commands.add_parser("table", help="tables and figures of a study", documentation=TABLE)
    table.add_argument("study", type=Path, metavar="STUDY", help="the folder of a study")
    table.add_argument(
        "--target-loss",
        type=_target,
        action="append",
        default=[],
        metavar="[TASK=]LOSS",
        help="count steps and seconds to this loss; default: the final loss of lambda = 1",
    )
    table.set_defaults(execute=_table)
    suggest = commands.add_parser("suggest", help="recommend eta_QK and eta_V", documentation=SUGGEST)
    suggest.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the settings of a run")
    suggest.add_argument(
        "--budget", type=_budget, required=True, metavar="B", help="in runs of the recipe: 17, or 10%%"
    )
    suggest.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the search")
    suggest.add_argument("--low", type=float, metavar="ETA", help="lowest rate; default: an eighth of the recipe's")
    suggest.add_argument("--high", type=float, metavar="ETA", help="highest rate; default: eight times the recipe's")
    suggest.add_argument(
        "--margin", type=float, default=0.02, metavar="X", help="share of the loss that is none; default %(default)s"
    )
    suggest.add_argument("--no-balance", action="store_true", help="do not measure the balance point, in one process")
    suggest.add_argument(
        "--workers", type=positive, metavar="N", help="runs at a time; default: one per GPU or CPU core"
    )
    suggest.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the recipe's"
    )
    suggest.set_defaults(execute=_suggest)
    attention = commands.add_parser("attention", help="how runs have changed attention", documentation=ATTENTION)
    attention.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run folder, as a cell of a study")
    attention.add_argument("--rows", type=positive, default=8, metavar="N", help="evaluation rows; default %(default)s")
    attention.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="the first tokens of a row; default %(default)s"
    )
    attention.set_defaults(execute=_attention)
    name, *words = sys.argv[1:] or [""]
    # Options may stand between overrides, which argparse does not allow below another parser.
    options = commands.choices[name].parse_intermixed_args(words) if name in commands.choices else parser.parse_args()
    return run_alone(lambda: options.execute(options))


def _grid(options: argparse.Namespace) -> None:
    if options.submit is None:
        train_grid(options.grid, options.overrides, options.workers, options.ranks_per_cell)
    else:
        request = ArrayRequest(options.submit, options.sbatch, options.workers, options.ranks_per_cell)
        submit_grid(options.grid, options.overrides, request)


def _toy(options: argparse.Namespace) -> None:
    with heavy_imports():
        from qvtune.study.toy_report import toy
    toy(options.output, options.seeds)


def _bounds(options: argparse.Namespace) -> None:
    run = load_config(options.recipe, options.overrides)
    with heavy_imports():
        from qvtune.study.bounds_report import print_bounds
    print_bounds(run, options.rows, options.bits, options.run)


def _table(options: argparse.Namespace) -> None:
    require_extra("matplotlib")
    read_cells(options.study)
    with heavy_imports():
        from qvtune.study.report import write_report
    write_report(options.study, dict(options.target_loss))


def _attention(options: argparse.Namespace) -> None:
    for run in options.runs:
        require_source(run)
    with heavy_imports():
        from qvtune.study.attention import measure_runs
    measure_runs(options.runs, options.rows, options.max_tokens)


def _target(text: str) -> tuple[str, float]:
    """``sst2=0.25``, or ``0.25`` for every task, whose name is then empty."""
    task, _, loss = text.rpartition("=")
    if not re.fullmatch(r"\d*\.?\d+([eE]-?\d+)?", loss):
        raise argparse.ArgumentTypeError(f"{text!r} is not a loss, as 0.25, or a loss of a task, as sst2=0.25")
    return task, float(loss)


def _suggest(options: argparse.Namespace) -> None:
    load_config(options.recipe, options.overrides)
    with heavy_imports():
        from qvtune.study.suggest import Request
        from qvtune.study.suggest_run import suggest
    request = Request(options.budget, options.margin, options.low, options.high)
    suggest(
        options.recipe,
        options.overrides,
        options.output,
        request,
        balance=not options.no_balance,
        workers=options.workers,
    )


def _budget(text: str) -> float:
    """``10%`` or a number of runs."""
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs > 0, as in 17, and no share of one, as in 10%")
    return found


if __name__ == "__main__":
    sys.exit(main())
