"""A study as a Slurm job array."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvtune.console import console
from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder
from qvtune.study.run import grid_with_ranks, open_study
from qvtune.submit.submit import all_or_nothing, call_sbatch, copy_code, new_name, sbatch_problems


@dataclass(frozen=True)
class ArrayRequest:
    """``tasks`` of the array, each on its own node; further ``options`` of sbatch; the rest as of ``run_cells``."""

    tasks: int
    options: Sequence[str] = ()
    workers: int | None = None
    ranks_per_cell: int = 1


def submit_grid(path: Path, overrides: Sequence[str], request: ArrayRequest) -> str:
    """Submit the cells of a grid as a job array; returns its id.

    The jobs run a copy of the code in STUDY/submitted/TIME, and share the cells among them.
    Raises UserError with all problems; nothing is submitted then.
    """
    grid = grid_with_ranks(path, overrides)
    if problems := sbatch_problems(request.options):
        raise UserError(problems)
    study = grid.folder.absolute()
    open_study(grid.recipe, grid.cells, study)
    frozen = new_name(study / "submitted")
    arguments = [str(study), str(request.ranks_per_cell), *([] if request.workers is None else [str(request.workers)])]
    script = frozen / "slurm" / "study.sbatch"
    command = ["sbatch", "--parsable", f"--array=0-{request.tasks - 1}", *request.options, str(script), *arguments]
    with all_or_nothing(frozen):
        with atomic_folder(frozen) as private:
            copy_code(private)
        job = call_sbatch(command, {**os.environ, "QVTUNE_HOME": str(frozen)})
    for line in (*grid.notes, shlex.join(command), f"job array {job}: {len(grid.cells)} cells, {request.tasks} tasks"):
        console().print(line, markup=False, soft_wrap=True)
    return job
