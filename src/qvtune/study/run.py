"""Trains the cells of a study: starts workers, shows how far they are, and replaces one that dies.

STUDY/recipe.yaml      a copy of the recipe
      grid.yaml        the cells: names, factors, overrides
      cells/NAME/      the run folder of a cell; failed.txt where it has failed, with the reason
      locks/           a file for each cell that is being trained
      logs/            what the workers have printed
"""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from qvtune.console import console
from qvtune.distributed.command import run_alone
from qvtune.distributed.stop_signals import record_stop_signals, take_recorded
from qvtune.errors import StopRequested, UserError
from qvtune.report.metrics import read_metrics
from qvtune.storage.atomic import atomic_file
from qvtune.study.cell import GRID_FILE, Cell, Grid, cell_folder, dump_cells, read_cells, read_grid
from qvtune.study.extra import require_extra
from qvtune.study.processes import Share, Worker, shares
from qvtune.study.worker import FAILED, RECIPE, claim, is_open, write_failure
from qvtune.system import heavy_imports

_POLL_SECONDS = 0.2
_MOST_DEATHS = 2  # of workers with the same cell, or before any cell


class CellsFailedError(UserError):
    """Cells of a study have failed; all others are complete."""

    exit_code = 1


def run_cells(
    recipe: Path,
    cells: Sequence[Cell],
    study: Path,
    *,
    workers: int | None = None,
    ranks_per_cell: int = 1,
    shared: bool = False,
) -> list[str]:
    """Train what is not complete of ``cells``, each in STUDY/cells/NAME. Returns the names of those that have failed.

    Complete cells are left as they are, interrupted ones resume, those that have failed are tried again. Several
    processes may do this in one folder at the same time; this one returns when all cells are complete or have failed.
    ``workers`` train one cell each, on ``ranks_per_cell`` ranks; by default as many as there are GPUs or CPU cores for.

    ``shared``: for one of several processes whose folder ``open_study`` has prepared; it does not wait for the others.

    Raises UserError where the folder holds the cells of another recipe, and StopRequested after a stop signal, when all
    workers have saved and ended.
    """
    record_stop_signals()
    if not shared:
        open_study(recipe, cells, study)
    coordinator = _Coordinator(study, list(cells), shares(workers, ranks_per_cell, len(cells)))
    return coordinator.run(wait_for_others=not shared)


def train_grid(path: Path, overrides: Sequence[str], workers: int | None = None, ranks_per_cell: int = 1) -> None:
    """``run_cells`` for the grid in a file, and the report of its study. Raises CellsFailedError as well."""
    require_extra("matplotlib")
    grid = grid_with_ranks(path, overrides)
    for note in grid.notes:
        console().print(note, markup=False, soft_wrap=True)
    failed = run_cells(grid.recipe, grid.cells, grid.folder, workers=workers, ranks_per_cell=ranks_per_cell)
    _report(grid.folder, grid.cells, failed)
    console().print(f"{grid.folder}: all {len(grid.cells)} cells are complete", markup=False, soft_wrap=True)


def _report(study: Path, cells: Sequence[Cell], failed: Sequence[str]) -> None:
    """Write the report. Raises CellsFailedError where cells have failed."""
    with heavy_imports():
        from qvtune.study.report import write_report
    write_report(study)
    if failed:
        which = ", ".join(failed)
        raise CellsFailedError(f"{len(failed)} of {len(cells)} cells have failed (cells/NAME/{FAILED}): {which}")


def grid_with_ranks(path: Path, overrides: Sequence[str]) -> Grid:
    """``read_grid``, with the ranks of equal parameter counts."""
    grid = read_grid(path, overrides)
    if not any("parameters" in cell.factors for cell in grid.cells):
        return grid
    with heavy_imports():
        from qvtune.study.counts import rank_for
    return read_grid(path, overrides, rank_for)


def open_study(recipe: Path, cells: Sequence[Cell], study: Path) -> None:
    """Write recipe.yaml and grid.yaml, or compare them with what is there; forget that cells have failed."""
    if (study / GRID_FILE).exists():
        problems = []
        if _content(study / RECIPE) != _content(recipe):
            problems.append(f"{study / RECIPE} is not {recipe}, as it is now")
        before = {cell.name: cell.overrides for cell in read_cells(study)}
        changed = [cell.name for cell in cells if before.get(cell.name, cell.overrides) != cell.overrides]
        if changed:
            problems.append(f"{len(changed)} cells there had other settings: {', '.join(changed[:5])}")
        if problems:
            raise UserError([*problems, f"{study} holds another study; give another run_dir, or move it away"])
    study.mkdir(parents=True, exist_ok=True)
    with atomic_file(study / RECIPE) as private:
        shutil.copyfile(recipe, private)
    with atomic_file(study / GRID_FILE) as private:
        private.write_text(dump_cells(cells), encoding="utf-8")
    for cell in cells:
        (cell_folder(study, cell) / FAILED).unlink(missing_ok=True)


def _content(path: Path) -> object:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


class _Coordinator:
    """Workers and what they have done."""

    def __init__(self, study: Path, cells: list[Cell], places: list[Share]) -> None:
        self._study, self._cells, self._places = study, {cell.name: cell for cell in cells}, places
        self._open_names = list(self._cells)
        self._seconds: list[float] = []  # of each cell that was finished by this process
        self._deaths: Counter[str] = Counter()

    def run(self, *, wait_for_others: bool) -> list[str]:
        """As ``run_cells``."""
        is_left = bool(self._open())
        while is_left:
            num_open = len(self._open())
            places = self._places[:num_open]
            self._say(f"{num_open} of {len(self._cells)} cells to train, {len(places)} workers")
            with self._started(places) as workers:
                self._watch(workers)
            is_left = wait_for_others and self._await_others()
        return [name for name, cell in self._cells.items() if (cell_folder(self._study, cell) / FAILED).exists()]

    def _open(self) -> list[str]:
        """Names of the open cells; one that is not open is not looked at again."""
        self._open_names = [name for name in self._open_names if is_open(self._study, self._cells[name])]
        return self._open_names

    @contextmanager
    def _started(self, places: Sequence[Share]) -> Iterator[list[Worker]]:
        """Workers; whatever happens, they have ended afterwards."""
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(self._study, place)) for place in places]
            for worker in workers:
                worker.start()
            yield workers

    def _watch(self, workers: list[Worker]) -> None:
        """Until all workers have ended. Raises StopRequested when that was requested."""
        stopped = ""
        while any(worker.is_running for worker in workers):
            time.sleep(_POLL_SECONDS)
            if not stopped and (recorded := take_recorded()):
                stopped = f"stopped on request ({next(iter(recorded)).name})"
            for worker in workers:
                code = worker.ended()  # first: what it has reported before it ended can then be read
                for event in worker.events():
                    self._show(**event)
                if code == StopRequested.exit_code:
                    stopped = stopped or "stopped on request (of a worker)"
                elif code and not stopped:
                    self._replace(worker, code)
            if stopped:
                for worker in workers:
                    worker.request_stop()
        if stopped:
            raise StopRequested(f"{stopped}; the same command resumes")

    def _replace(self, worker: Worker, code: int) -> None:
        """Start a worker again that an error or a signal has ended; a cell with which that happens twice has failed."""
        name = worker.cell or ""
        self._deaths[name] += 1
        has_failed = bool(name) and not is_open(self._study, self._cells[name])
        if not has_failed:
            self._say(f"worker {worker.place.number} ended with {_text(code)}; its output: {worker.log}")
            if not name and self._deaths[name] > _MOST_DEATHS * len(self._places):
                raise UserError(f"workers do not start, the last one ended with {_text(code)}; see {worker.log}")
            if name and self._deaths[name] >= _MOST_DEATHS:
                reason = f"its process has ended {_MOST_DEATHS} times, the last time with {_text(code)}"
                write_failure(self._study, self._cells[name], f"{reason}; its output: {worker.log}")
                has_failed = True
        if has_failed:
            self._show(name, "failed", 0.0)
        if self._open():
            worker.start()

    def _await_others(self) -> bool:
        """Wait while other processes train all that is open; returns whether something is left for this one."""
        cells, said = list(self._cells.values()), False
        while open_cells := self._open():
            with ExitStack() as held:
                if claim(self._study, cells, held) is not None:
                    return True
            if not said:
                self._say(f"waiting for other processes, which train {', '.join(open_cells)}")
                said = True
            if recorded := take_recorded():
                raise StopRequested(f"stopped on request ({next(iter(recorded)).name}); the same command resumes")
            time.sleep(_POLL_SECONDS)
        return False

    def _show(self, cell: str, state: str, seconds: float) -> None:
        """Say that a cell is complete or has failed, and how far the study is."""
        if state == "started":
            return
        folder = cell_folder(self._study, self._cells[cell])
        num_open = len(self._open())
        num_failed = sum((cell_folder(self._study, one) / FAILED).exists() for one in self._cells.values())
        failed = f", {num_failed} failed" if num_failed else ""
        if state == "failed":
            path = folder / FAILED
            text = path.read_text(encoding="utf-8").strip().splitlines()[-1] if path.exists() else "is tried again"
        else:
            self._seconds.append(seconds)
            last = read_metrics(folder, "eval")[-1]
            metrics = {
                key: value for key, value in last.items() if key in ("loss", "accuracy", "pearson", "exact_match")
            }
            text = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()) + f" ({seconds:.0f} s)"
        left = f", {_duration(self._left(num_open))} left" if num_open and self._seconds else ""
        self._say(
            f"{len(self._cells) - num_open - num_failed} of {len(self._cells)} cells{failed}{left} | {cell}: {text}"
        )

    def _left(self, num_open: int) -> float:
        """Seconds, if the open cells take as long as those that were finished here."""
        return num_open * sum(self._seconds) / len(self._seconds) / min(len(self._places), num_open)

    def _say(self, text: str) -> None:
        console().print(text, markup=False, soft_wrap=True)


def _text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def main(arguments: Sequence[str]) -> int:
    """For slurm/study.sbatch: STUDY [RANKS_PER_CELL [WORKERS]]; the study's folder has been prepared."""
    study, cells = Path(arguments[0]), read_cells(Path(arguments[0]))
    ranks_per_cell = int(arguments[1]) if len(arguments) > 1 else 1
    workers = int(arguments[2]) if len(arguments) > 2 else None

    def work() -> None:
        failed = run_cells(study / RECIPE, cells, study, workers=workers, ranks_per_cell=ranks_per_cell, shared=True)
        _report(study, cells, failed)

    return run_alone(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
