"""What launch/submit.py refuses, shows and freezes; with a real Slurm it runs in tests/slurm."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qvtune.config.load import load_config
from qvtune.errors import UserError
from qvtune.plan import plan
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
    (lab.folder / "cluster.env").write_text("")
    monkeypatch.delenv("QVTUNE_PROCS_PER_NODE", raising=False)
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


def test_the_estimates_of_the_plan_are_shown_where_the_gpu_is_known(
    request_: Request, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def short_plan(run: object, plan_request: object) -> list[str]:
        seen.append(plan_request)
        return ["three lines"]

    monkeypatch.setattr(plan, "short_plan", short_plan)
    submit(replace(request_, gpu="a100-80"))
    assert seen == [plan.Request(3, 2, "a100-80")] and "three lines" in capsys.readouterr().out
    submit(request_)
    assert len(seen) == 1
    assert "--gpu a100-80: all ranks run on CPUs" in problems_of(replace(request_, gpu="a100-80", procs_per_node=1))


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
        *("/nowhere/cluster.env does not exist", "/nowhere/rows.jsonl", "none.json", "optimizer.lr_multipliers: 'k'"),
    ]
    assert [part for part in expected if part not in found] == [], found


def test_the_batch_must_fit_the_ranks_of_the_job(request_: Request) -> None:
    """6 rows: for 6 ranks, not for 4."""
    submit(request_)
    assert "on 4 ranks" in problems_of(replace(request_, nodes=2))
    submit(replace(request_, nodes=2, procs_per_node=1))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ("export QVTUNE_PROCS_PER_NODE=3", True),
        ("four=4\nexport QVTUNE_PROCS_PER_NODE=$((four / 2))", False),
        ("# export QVTUNE_PROCS_PER_NODE=2", True),
        ("echo a module system greets; export QVTUNE_PROCS_PER_NODE=2 OTHER=1; echo done", False),
    ],
)
def test_the_ranks_per_node_are_those_of_cluster_env(lab: Lab, request_: Request, settings: str, fits: bool) -> None:
    """6 rows on 2 nodes: for 3 ranks per node, not for 2."""
    (lab.folder / "cluster.env").write_text(settings + "\n")
    request = replace(request_, nodes=2, gpus_per_node=3)
    if fits:
        submit(request)
    else:
        assert "on 4 ranks" in problems_of(request)


def test_cluster_env_and_command_line_must_agree_on_the_ranks(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(request_, procs_per_node=1)
    (lab.folder / "cluster.env").write_text("export QVTUNE_PROCS_PER_NODE=2\n")
    assert "--procs-per-node 1" in problems_of(request) and "sets QVTUNE_PROCS_PER_NODE to 2" in problems_of(request)
    (lab.folder / "cluster.env").write_text('export QVTUNE_PROCS_PER_NODE="${QVTUNE_PROCS_PER_NODE:-2}"\n')
    submit(request)
    monkeypatch.setenv("QVTUNE_PROCS_PER_NODE", "4")
    assert "on 12 ranks" in problems_of(request_), "sbatch hands on the variables of this shell"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("export QVTUNE_PROCS_PER_NODE=all", "'all' is not a number of ranks per node"),
        ("export QVTUNE_PROCS_PER_NODE=0", "'0' is not a number of ranks per node"),
        ("echo no such module >&2; exit 3", "ended bash with exit code 3: no such module"),
        ("sleep 60", "has not finished"),
    ],
)
def test_a_cluster_env_that_gives_no_number_is_refused(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch, settings: str, message: str
) -> None:
    monkeypatch.setattr(module, "_SETTINGS_SECONDS", 1)
    (lab.folder / "cluster.env").write_text(settings + "\n")
    assert message in problems_of(request_)


def test_the_name_of_cluster_env_is_no_command(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "a'b $(touch broken) \"c; touch broken"
    settings.write_text("export QVTUNE_PROCS_PER_NODE=2\n")
    monkeypatch.setenv("QVTUNE_CLUSTER_ENV", str(settings))
    monkeypatch.chdir(tmp_path)
    assert "on 4 ranks" in problems_of(replace(request_, nodes=2, gpus_per_node=3))
    assert [path.name for path in tmp_path.iterdir()] == [settings.name]


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
