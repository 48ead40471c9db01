"""launch/submit.py on the login host: what it refuses, and that a queued job is out of reach of later edits."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.slurm.cluster import LOGIN
from tests.slurm.site import Site
from tests.support.processes import REPOSITORY

HOSTILE = 'it\'s a "run" $(touch pwned); `touch pwned` & %j\nof two lines'


@pytest.fixture(scope="session")
def checkout(site: Site) -> Path:
    """Like ``site.home``, but with code that can be edited, below a name that is hard to quote."""
    folder = site.lab.folder / "check out $(touch pwned)"
    for name in ("launch", "src", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(site.home / "slurm", folder / "slurm")
    with (folder / "slurm" / "cluster.env").open("a") as settings:
        settings.write("export QVTUNE_DOCTOR=1\n")
    return folder


def submit(site: Site, checkout: Path, run_dir: Path, *arguments: str) -> CompletedProcess[str]:
    """Type it in ``checkout``: 2 hosts, 1 process each."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{site.cluster.environment['PATH']}",
        "PYTHONPATH": str(checkout / "src"),
        "QVTUNE_CACHE": str(site.lab.folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["python", "launch/submit.py", "--nodes=2", "--gpus-per-node=8", "--procs-per-node=1"]
    command += ["--config=../recipe.yaml", f"run_dir={json.dumps(str(run_dir))}", *arguments]
    return site.cluster.run(LOGIN, *command, check=False, timeout=240, cwd=checkout, environment=environment)


def jobs(site: Site) -> str:
    """All that slurmctld remembers."""
    return site.cluster.run(LOGIN, "squeue", "--all", "--states=all", "--noheader", "--format=%i").stdout


def test_a_typo_is_refused_before_sbatch(site: Site, checkout: Path) -> None:
    before, run_dir = jobs(site), site.lab.run_dir("typo")
    done = submit(site, checkout, run_dir, "train.max_step=3", "--sbatch", "exclude=n1")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not an option of sbatch" in lines[0] and "`train.max_steps`?" in lines[1], done.stderr
    assert jobs(site) == before and not run_dir.exists()


def test_what_sbatch_refuses_leaves_nothing(site: Site, checkout: Path) -> None:
    run_dir = site.lab.folder / "new" / "folder"
    done = submit(site, checkout, run_dir, "--partition", "nowhere")
    assert done.returncode == 2 and "error: sbatch: error: invalid partition specified: nowhere" in done.stderr, done
    assert not run_dir.parent.exists()


def test_editing_the_checkout_does_not_reach_a_queued_job(site: Site, checkout: Path) -> None:
    run_dir = site.lab.folder / "runs" / HOSTILE
    length = ["train.max_steps=2", "data.eval=null"]
    done = submit(site, checkout, run_dir, "--sbatch=--hold", f"--sbatch=--job-name={HOSTILE}", *length)
    assert done.returncode == 0, done.stdout + done.stderr
    job = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))
    assert f"scancel {job} " in done.stdout and "tail -F " in done.stdout
    command = shlex.split(done.stdout[done.stdout.index("sbatch --parsable") : done.stdout.index("job ")])
    assert command[-1].startswith(str(run_dir))
    for name in ("launch/train.py", "src/qvtune/train/loop.py", "src/qvtune/__init__.py", "slurm/node.sh"):
        (checkout / name).write_text("raise SystemExit('edited')\n")
    (checkout / "ds_configs" / "zero3.json").write_text("{}")
    site.cluster.run(LOGIN, "scontrol", "release", job)
    ended = site.cluster.wait(job, timeout=240)
    log = (checkout / f"slurm-{job}.out").read_text()  # a path with spaces, which Job.output does not know whole
    assert (ended.state, ended.code) == ("COMPLETED", 0), log
    assert "\nGO\n" in log, log
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [entry["step"] for entry in map(json.loads, lines) if entry["event"] == "step"] == [1, 2]
    (frozen,) = (run_dir / "submitted").iterdir()
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["argv"][0] == str(frozen / "launch" / "train.py") and environment["hosts"] == ["n1", "n2"]
    assert list(site.lab.folder.rglob("pwned")) == []
