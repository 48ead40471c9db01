"""slurm/sweep.sbatch: a grid of runs, one of which is killed and run again, and the table."""

import csv

import pytest

from tests.slurm.cluster import Job, wait_until
from tests.slurm.site import MAX_STEPS, Site

pytestmark = pytest.mark.timeout(1200)  # every wait in here has a limit of its own

GRID = ("optimizer.lr=1e-3,1e-2", "optimizer.lr_multipliers.v=1,4")


def submit(site: Site, array: str) -> str:
    """The sweep of ``GRID`` into ``runs/sweep``, one process a task; the array's id."""
    options = ("--partition=all", f"--array={array}", "--gpus-per-node=1")
    arguments = ("slurm/sweep.sbatch", "../recipe.yaml", f"run_dir={site.lab.run_dir('sweep')}", *GRID)
    return site.cluster.sbatch(*options, *arguments, cwd=site.home)


def table_of(site: Site, array: str) -> list[dict[str, str]]:
    """The cells in the report that the dependent job has written."""
    log = site.home / f"slurm-{array}_table.out"
    wait_until(lambda: log.exists() and "report.html" in log.read_text(), "the sweep's report", timeout=120)
    with (site.lab.run_dir("sweep") / "tables" / "cells.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_with_a_task_that_is_killed_and_run_again(site: Site) -> None:
    """Two of its four runs; the others have not been started."""
    array = submit(site, "1-2")
    killed = f"{array}_2"
    site.wait_for_step(killed, "sweep/cells/ratio1_lr0.01", 1, timeout=240)
    site.cluster.scancel("--signal=KILL", killed)
    jobs: list[Job] = [site.cluster.wait(f"{array}_{index}", timeout=400) for index in (1, 2)]
    assert [job.state for job in jobs] == ["COMPLETED", "CANCELLED"], jobs[1].story
    states = [row["state"] for row in table_of(site, array)]
    assert states == ["not started", "done", "not finished", "not started"]

    again = submit(site, "2")
    done = site.cluster.wait(f"{again}_2", timeout=300)
    assert done.state == "COMPLETED", done.story
    rows = table_of(site, again)
    assert [row["state"] for row in rows] == ["not started", "done", "done", "not started"]
    for row in rows[1:3]:
        name = f"sweep/cells/ratio{float(row['ratio']):g}_lr{float(row['learning_rate']):g}"
        assert float(row["after eval loss"]) == pytest.approx(site.lab.events(name, "eval")[-1]["loss"], rel=1e-9)
        assert site.lab.events(name, "step")[-1]["step"] == MAX_STEPS
    assert rows[1]["after eval loss"] != rows[2]["after eval loss"]


def test_an_array_that_is_larger_than_the_grid_is_refused(site: Site) -> None:
    array = submit(site, "7")
    done = site.cluster.wait(f"{array}_7", timeout=60)
    assert (done.state, done.code) == ("FAILED", 2) and "--array=0-3" in done.log(), done.story
