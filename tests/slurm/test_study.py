"""launch/study.py grid --submit: the tasks of an array share the cells; the results are those of the same grid here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvtune.report.metrics import read_metrics
from qvtune.study.cell import read_cells
from tests.slurm.cluster import LOGIN
from tests.slurm.site import Site
from tests.support.processes import run_command

pytestmark = pytest.mark.timeout(1800)  # every wait in here has a limit of its own


def test_an_array_gives_the_results_of_the_same_grid_on_one_machine(site: Site, tmp_path: Path) -> None:
    """Four cells and two tasks."""
    factors = {"projections": ["qv", "qkv"], "ratio": [1, 4]}
    grid = {"recipe": "recipe.yaml", "run_dir": str(site.lab.run_dir("study")), "factors": factors}
    grid["cells"] = [{"train.max_steps": 6}]
    (site.lab.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    options = ["--submit", "2", "--sbatch=--partition=all", "--sbatch=--gpus-per-node=1"]
    command = ["python", "launch/study.py", "grid", str(site.lab.folder / "grid.yaml"), *options]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(site.home / "src")}
    done = site.cluster.run(LOGIN, *command, cwd=site.home, environment=environment)
    array = next(line for line in done.stdout.splitlines() if line.startswith("job array")).split()[2].rstrip(":")
    jobs = [site.cluster.wait(f"{array}_{task}", timeout=600) for task in range(2)]
    assert [(job.state, job.code) for job in jobs] == [("COMPLETED", 0)] * 2, jobs[0].story

    here = ["launch/study.py", "grid", str(site.lab.folder / "grid.yaml"), f"run_dir={tmp_path / 'study'}"]
    ended = run_command([sys.executable, *here], tmp_path, timeout=600, **site.lab.environment)
    assert ended.code == 0, ended.output
    expected = results(tmp_path / "study")
    assert len(expected) == 4 and results(site.lab.run_dir("study")) == expected


def results(study: Path) -> dict[str, Any]:
    """All losses and evaluations of each cell."""
    return {
        cell.name: (
            [entry["loss"] for entry in read_metrics(study / "cells" / cell.name, "step")],
            (study / "cells" / cell.name / "eval_rows.jsonl").read_text(),
        )
        for cell in read_cells(study)
    }
