"""A grid that is given on the command line, for slurm/sweep.sbatch, whose runs may take several nodes each.

``python -m qvtune.study.sweep point INDEX RECIPE [override ...]`` prepares the study in the recipe's ``run_dir`` and
prints the overrides of one cell, each followed by a zero byte. ``... table RECIPE [override ...]`` writes the report.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from qvtune.config.load import split_override
from qvtune.errors import UserError
from qvtune.study.cell import Grid, cell_folder, grid_of, override
from qvtune.study.grid_file import check_grid_file
from qvtune.study.run import open_study

# A value of a comma-separated list; commas inside brackets and quotes do not separate.
_VALUE = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")
_FACTORS = {  # settings that are factors of a study by another name
    "adapter.projections": "projections",
    "adapter.method": "method",
    "adapter.rank": "rank",
    "optimizer.lr": "learning_rate",
    "optimizer.lr_multipliers.v": "ratio",
    "train.seed": "seed",
}


def sweep(recipe: Path, arguments: Sequence[str]) -> Grid:
    """All combinations of the values in ``section.key=value,value``; the last setting varies fastest.

    Raises UserError if no setting has several values, and with all problems of the cells, as ``read_grid``.
    """
    factors, overrides = {}, []
    for argument in arguments:
        key, text = split_override(argument)
        values = [text] if key == "run_dir" else _VALUE.findall(text)
        if len(values) > 1:
            factors[_FACTORS.get(key, key)] = [yaml.safe_load(value) for value in values]
        else:
            overrides.append(argument)
    if not factors:
        raise UserError("sweep: no setting has several values; give one, e.g. optimizer.lr=1e-4,2e-4")
    file = check_grid_file({"recipe": str(recipe), "factors": factors}, "sweep")
    return grid_of(file, "sweep", recipe, overrides)


def point(index: int, recipe: Path, arguments: Sequence[str]) -> list[str]:
    """The overrides of a cell, its ``run_dir`` last; the study's folder is then there.

    Raises UserError as ``sweep``, for an index beyond the grid, and where the folder holds another study.
    """
    grid = sweep(recipe, arguments)
    if index >= (number := len(grid.cells)):
        raise UserError(f"sweep: there is no run {index}, the grid has {number}: --array=0-{number - 1}")
    open_study(grid.recipe, grid.cells, grid.folder)
    cell = grid.cells[index]
    return [*cell.overrides, override("run_dir", str(cell_folder(grid.folder, cell)))]


def main(arguments: Sequence[str]) -> int:
    """Run a command (see the top of this file); returns 0, or the exit code of a UserError, which is printed."""
    command, *rest = arguments
    try:
        if command == "point":
            index, recipe, *overrides = rest
            sys.stdout.write("".join(f"{one}\0" for one in point(int(index), Path(recipe), overrides)))
        else:
            assert command == "table", command
            from qvtune.study.report import write_report

            page = write_report(sweep(Path(rest[0]), rest[1:]).folder)
            sys.stdout.write(page.with_suffix(".md").read_text(encoding="utf-8"))
    except UserError as error:
        sys.stderr.writelines(f"error: {problem}\n" for problem in error.problems)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
