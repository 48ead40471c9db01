"""slurm/sweep.sbatch: a grid of runs, one of which is killed and run again, and the table."""

import csv
from pathlib import Path

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
    """What the dependent job has made of the runs."""
    log = site.home / f"slurm-{array}_table.out"
    wait_until(lambda: log.exists() and "sweep.csv" in log.read_text(), "the sweep's table", timeout=120)
    path = Path(log.read_text().split()[-1])
    assert path == site.lab.run_dir("sweep") / "sweep.csv"
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_with_a_task_that_is_killed_and_run_again(site: Site) -> None:
    """Two of its four runs; the others have not been started."""
    array = submit(site, "1-2")
    killed = f"{array}_2"
    name = "sweep/lr=1e-2,lr_multipliers.v=1"
    site.wait_for_step(killed, name, 1, timeout=240)
    site.cluster.scancel("--signal=KILL", killed)
    jobs: list[Job] = [site.cluster.wait(f"{array}_{index}", timeout=400) for index in (1, 2)]
    assert [job.state for job in jobs] == ["COMPLETED", "CANCELLED"], jobs[1].story
    rows = table_of(site, array)
    assert sorted(row["state"] for row in rows[1:]) == ["not completed", "not started", "not started"]
    assert rows[0]["state"] == "completed"
    (row,) = [row for row in rows if row["state"] == "not completed"]
    assert (row["optimizer.lr"], row["optimizer.lr_multipliers.v"], row["eval_loss"]) == ("1e-2", "1", "")

    again = submit(site, "2")
    done = site.cluster.wait(f"{again}_2", timeout=300)
    assert done.state == "COMPLETED", done.story
    rows = table_of(site, again)
    expected = [("completed", str(MAX_STEPS))] * 2 + [("not started", "0")] * 2
    assert [(row["state"], row["step"]) for row in rows] == expected
    losses = [float(row["eval_loss"]) for row in rows[:2]]
    assert losses == sorted(losses) and len(set(losses)) == 2
    for row in rows[:2]:
        name = f"sweep/lr={row['optimizer.lr']},lr_multipliers.v={row['optimizer.lr_multipliers.v']}"
        assert float(row["eval_loss"]) == site.lab.events(name, "eval")[-1]["loss"]
    assert len({row["eval_loss_before"] for row in rows[:2]}) == 1


def test_an_array_that_is_larger_than_the_grid_is_refused(site: Site) -> None:
    array = submit(site, "7")
    done = site.cluster.wait(f"{array}_7", timeout=60)
    assert (done.state, done.code) == ("FAILED", 2) and "--array=0-3" in done.log(), done.story
