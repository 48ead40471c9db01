"""What `launch/study.py suggest` runs: the budget becomes a search, whose runs are cells of a study."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.console import console
from qvtune.study.balance import measure_balance
from qvtune.study.cell import Cell
from qvtune.study.extra import require_extra
from qvtune.study.run import run_cells
from qvtune.study.search import WIDE
from qvtune.study.suggest import SHORTEST, Request, begun, check_recipe, search_all, search_of
from qvtune.study.suggest_report import write
from qvtune.train.data import TRAIN, load_data, max_steps


def suggest(
    recipe: Path, overrides: Sequence[str], output: Path, request: Request, *, balance: bool, workers: int | None
) -> None:
    """Search learning rates for a recipe with ``overrides``; print the verdict, and write it into ``output``.

    ``balance``: measure the balance point first, in this process. ``workers``: as ``run_cells``.
    Raises UserError for what cannot be searched, and for a budget that is too small.
    """
    require_extra("optuna", "matplotlib")
    run, out = load_config(recipe, overrides), console()
    check_recipe(run)
    total_steps = max_steps(run, len(load_data(run).rows[TRAIN]))
    before = (begun(output) or {}).get("search", {})
    search = search_of(run, total_steps, request, before.get("balance"), before.get("steps"))
    if balance and not before:
        search = replace(search, balance=float(f"{measure_balance(run):.3g}"))
        out.print(f"balance point: lambda = {search.balance:g}", markup=False)
    out.print(
        f"runs of up to {search.steps} steps, both rates from {search.low:.3g} to {search.high:.3g}, up to "
        f"{search.most_seeds} seeds",
        markup=False,
    )
    if search.steps < SHORTEST:
        out.print(
            f"warning: below {SHORTEST} steps a run is mostly warm-up and noise, and the first runs here have "
            f"{search.length(WIDE)}: they can prefer other rates than the recipe's {total_steps} steps",
            markup=False,
            soft_wrap=True,
        )

    def evaluate(cells: Sequence[Cell]) -> None:
        run_cells(
            recipe, [replace(one, overrides=(*overrides, *one.overrides)) for one in cells], output, workers=workers
        )

    verdict, results = search_all(output, run, search, evaluate)
    for line in write(output, verdict, search, results, run):
        out.print(line, markup=False, soft_wrap=True)
