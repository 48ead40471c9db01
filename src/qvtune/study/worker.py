"""One rank of a worker, which trains cells of a study one after another: python -m qvtune.study.worker STUDY PARENT FD

What takes long is done once: imports, process group, reading and quantizing the base. ``qvtune.study.run`` starts
workers; it is the process PARENT, whose end is a request to stop, and reads what rank 0 reports from the pipe FD.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.distributed.command import run_command
from qvtune.storage.lock import exclusive
from qvtune.study.cell import Cell, cell_folder, override, read_cells
from qvtune.submit.batch import has_finished
from qvtune.system import heavy_imports

RECIPE, FAILED = "recipe.yaml", "failed.txt"


class TakenError(Exception):
    """Another process trains the cell."""


def is_open(study: Path, cell: Cell) -> bool:
    """Whether a cell has neither been trained to its end nor failed."""
    folder = cell_folder(study, cell)
    return not (folder / FAILED).exists() and not has_finished(folder)


def write_failure(study: Path, cell: Cell, reason: str) -> None:
    """Say in the cell's folder why there is no result; the first reason stays."""
    path = cell_folder(study, cell) / FAILED
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(reason.rstrip() + "\n", encoding="utf-8")


def claim(study: Path, cells: Sequence[Cell], held: ExitStack) -> Cell | None:
    """The first open cell that nobody trains, locked until ``held`` is closed or the process ends; None without one."""
    for cell in cells:
        if is_open(study, cell):
            try:
                held.enter_context(exclusive(study / "locks" / cell.name, _refuse))
            except TakenError:
                continue
            if is_open(study, cell):
                return cell
            held.close()
    return None


def _refuse() -> None:
    raise TakenError


def main(arguments: Sequence[str]) -> int:
    """Train until no cell is open; returns 0, or 75 after a request to stop. An error in a cell, other than one of its
    settings or data, ends the process: what it leaves in memory is not trusted."""
    study, parent, descriptor = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    return run_command(lambda: read_cells(study), lambda cells: _work(study, cells, parent, descriptor))


def _work(study: Path, cells: list[Cell], parent: int, descriptor: int) -> int:
    from qvtune.distributed import process_group
    from qvtune.distributed.stop import StopRequest
    from qvtune.errors import StopRequested, UserError

    with heavy_imports():
        from qvtune.model.kept import KeptBase
        from qvtune.train.loop import train

    def report(cell: Cell, state: str, seconds: float = 0.0) -> None:
        if process_group.is_main():
            os.write(descriptor, f"{json.dumps({'cell': cell.name, 'state': state, 'seconds': seconds})}\n".encode())

    stop, kept = StopRequest(parent=parent), KeptBase()
    for cell in _claimed(study, cells):
        stop.poll()
        gc.collect()  # the engine and the model of the cell before refer to each other
        started = time.monotonic()
        report(cell, "started")
        folder = override("run_dir", str(cell_folder(study, cell)))
        try:
            code = train(load_config(study / RECIPE, [*cell.overrides, folder]), stop, kept)
        except UserError as error:  # raised on all ranks
            if process_group.is_main():
                write_failure(study, cell, "\n".join(error.problems))
            report(cell, "failed")
            continue
        except StopRequested:
            raise
        except Exception:
            write_failure(study, cell, traceback.format_exc())
            raise
        if code == StopRequested.exit_code:
            return code
        report(cell, "finished", time.monotonic() - started)
    return 0


def _claimed(study: Path, cells: list[Cell]) -> Iterator[Cell]:
    """Open cells, each locked while it is trained; the same on all ranks. Collective."""
    from qvtune.distributed import process_group

    while True:
        with ExitStack() as held:
            cell = process_group.broadcast_object(claim(study, cells, held) if process_group.is_main() else None)
            if cell is None:
                return
            yield cell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
