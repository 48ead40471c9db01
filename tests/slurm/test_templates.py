"""Every batch script: sbatch accepts it, and it says what it was not given."""

from pathlib import Path

import pytest

from tests.slurm.cluster import GPUS_PER_HOST, LOGIN
from tests.slurm.site import Site
from tests.support.processes import REPOSITORY

TEMPLATES = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))
OPTIONS = {"train.sbatch": ["--nodes=4", f"--gpus-per-node={GPUS_PER_HOST}"], "sweep.sbatch": ["--array=0-3"]}
OPTIONS["study.sbatch"] = OPTIONS["sweep.sbatch"]


def test_the_templates_are_these() -> None:
    assert TEMPLATES == ["convert.sbatch", "study.sbatch", "sweep.sbatch", "sweep_table.sbatch", "train.sbatch"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_sbatch_accepts_it(site: Site, template: str) -> None:
    command = ["sbatch", "--test-only", *OPTIONS.get(template, []), f"slurm/{template}", "../recipe.yaml"]
    accepted = site.cluster.run(LOGIN, *command, cwd=site.home)
    assert "to start at" in accepted.stderr


@pytest.mark.parametrize("template", TEMPLATES)
def test_outside_the_repository_it_says_where_to_go(site: Site, template: str, tmp_path: Path) -> None:
    script = site.home / "slurm" / template
    options = [*OPTIONS.get(template, []), "--nodes=1", "--output=out.txt"]
    job = site.cluster.sbatch(*options, script, "recipe.yaml", cwd=tmp_path)
    job = f"{job}_0" if template in ("study.sbatch", "sweep.sbatch") else job
    done = site.cluster.wait(job, timeout=60)
    assert (done.state, done.code) == ("FAILED", 2), done.story
    assert "submit from the repository's folder" in (tmp_path / "out.txt").read_text()


def test_without_settings_it_says_how_to_make_them(site: Site) -> None:
    job = site.train("unset", nodes=1, QVTUNE_CLUSTER_ENV="/nowhere/cluster.env")
    done = site.cluster.wait(job, timeout=60)
    assert (done.state, done.code) == ("FAILED", 2), done.story
    assert "error: /nowhere/cluster.env does not exist: cp slurm/cluster.env.example" in done.log()


def test_a_model_is_merged_after_the_training(site: Site, tmp_path: Path) -> None:
    job = site.train("merged", "train.max_steps=2", nodes=1)
    output = tmp_path / "merged model"
    arguments = ["slurm/convert.sbatch", site.lab.run_dir("merged"), "--output", output]
    convert = site.cluster.sbatch(f"--dependency=afterok:{job}", *arguments, cwd=site.home)
    waiting = site.cluster.job(convert)
    assert (waiting.state, waiting.reason) == ("PENDING", "Dependency"), waiting.story
    done = site.cluster.wait(convert, timeout=400)
    assert (done.state, done.code) == ("COMPLETED", 0), done.story
    assert (output / "model.safetensors").is_file() and (output / "merge_report.json").is_file()
