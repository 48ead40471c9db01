"""What launch/submit.py refuses, shows and freezes; with a real Slurm it runs in tests/slurm."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qvtune.config.load import load_config
from qvtune.errors import UserError
from qvtune.submit import submit as module
from qvtune.submit.submit import Request, freeze, submit
from qvtune.versions import repository
from tests.support.lab import Lab, make_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("submit"))
    (lab.folder / "recipe.yaml").write_text(yaml.safe_dump(lab.config("run")))
    return lab


@pytest.fixture(autouse=True)
def _a_login_node(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings, and with a cache; whether it has sbatch is up to the test."""
    (lab.folder / "cluster.env").touch()
    monkeypatch.setenv("QVTUNE_CLUSTER_ENV", str(lab.folder / "cluster.env"))
    monkeypatch.setenv("QVTUNE_CACHE", str(lab.folder / "cache"))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


@pytest.fixture
def request_(lab: Lab) -> Request:
    return Request(lab.folder / "recipe.yaml", (), nodes=3, gpus_per_node=2, dry_run=True)


def problems_of(request: Request) -> str:
    with pytest.raises(UserError) as caught:
        submit(request)
    return "\n".join(caught.value.problems)


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    lab: Lab, request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(replace(request_, partition="a b", time="1-0", sbatch=("--comment=$(x) 'y'",)))
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch "))
    *words, script, recipe = shlex.split(shown)
    options = ["--nodes=3", "--gpus-per-node=2", "--partition=a b", "--time=1-0", "--comment=$(x) 'y'"]
    assert words == ["sbatch", "--parsable", *options]
    assert Path(script).parts[-2:] == ("slurm", "train.sbatch") and Path(recipe).name == "config.yaml"
    assert not lab.run_dir("run").exists() and list(lab.folder.glob(".doctor*")) == []


def test_everything_that_is_wrong_is_said_at_once(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("QVTUNE_CLUSTER_ENV", "/nowhere/cluster.env")
    found = problems_of(
        replace(
            request_,
            dry_run=False,
            sbatch=("n3", "--export=NONE"),
            overrides=("data.train=/nowhere/rows.jsonl", "deepspeed=none.json", "optimizer.lr_multipliers.k=2"),
        )
    )
    expected = [
        *("--sbatch=n3: not an option", "--sbatch=--export=NONE", "SBATCH_EXPORT", "sbatch is not on PATH"),
        *("/nowhere/cluster.env is not there", "/nowhere/rows.jsonl", "none.json", "optimizer.lr_multipliers: 'k'"),
    ]
    assert [part for part in expected if part not in found] == [], found


def test_the_batch_must_fit_the_ranks_of_the_job(request_: Request) -> None:
    """6 rows: for 6 ranks, not for 4."""
    submit(request_)
    assert "on 4 ranks" in problems_of(replace(request_, nodes=2))
    submit(replace(request_, nodes=2, procs_per_node=1))


@pytest.mark.parametrize("change", [{"nodes": 0}, {"gpus_per_node": 0}, {"gpus_per_node": -1}])
def test_a_job_has_ranks(request_: Request, change: dict[str, int]) -> None:
    assert "--nodes must be at least 1" in problems_of(replace(request_, **change))  # type: ignore[arg-type]


def test_a_job_that_would_begin_anew_at_each_start_is_refused(request_: Request) -> None:
    assert "checkpoint.resume: never" in problems_of(replace(request_, overrides=("checkpoint.resume=never",)))


def test_a_disk_that_is_too_small_is_refused(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = module.shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr("qvtune.doctor.storage.shutil.disk_usage", lambda path: usage)
    assert "disk: 0.00 GB free" in problems_of(request_)


def test_the_frozen_copy_is_complete_and_loads_alike(tmp_path: Path, request_: Request) -> None:
    run = load_config(request_.config, ["deepspeed=zero2.json"])
    freeze(run, tmp_path / "frozen", request_, ["sbatch", "a b"])
    assert [path.name for path in tmp_path.iterdir()] == ["frozen"]
    frozen = load_config(tmp_path / "frozen" / "config.yaml")
    assert frozen.model_copy(update={"deepspeed": "zero2.json"}) == run
    assert Path(frozen.deepspeed).read_text() == (repository() / "ds_configs" / "zero2.json").read_text()
    for folder in ("launch", "src", "slurm", "ds_configs"):
        here = {path.relative_to(repository()) for path in (repository() / folder).rglob("*.*") if path.is_file()}
        copied = {path.relative_to(tmp_path / "frozen") for path in (tmp_path / "frozen" / folder).rglob("*.*")}
        assert {
            path for path in here - copied if "__pycache__" not in path.parts and "egg-info" not in str(path)
        } == set()
    record = json.loads((tmp_path / "frozen" / "submission.json").read_text())
    assert record["command"] == ["sbatch", "a b"]
    assert (tmp_path / "frozen" / "COMMIT").read_text().strip() == (record["commit"] or "")
