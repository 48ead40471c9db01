"""The trackers' own packages, without a network; skipped where they are not installed (extra ``trackers``)."""

import importlib.util
import json
from pathlib import Path

import pytest

from qvtune.config.report import ReportSection, TrackerName
from qvtune.report.followers import followers
from tests.report.runs import append, events, write_run


def track_two_starts(tracker: TrackerName, folder: Path) -> Path:
    """A run that was killed after step 30 and resumed from step 20."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed: pip install 'qvtune[trackers]'")
    settings = ReportSection(html=False, trackers=(tracker,), wait_seconds=120)
    run_dir = write_run(folder / "run", events(30, every=10, is_complete=False))
    with followers(run_dir, settings):
        pass
    append(run_dir, *events(40, 20, every=10))
    with followers(run_dir, settings):
        pass
    position = json.loads((run_dir / "trackers" / f"{tracker}.json").read_text())
    assert position["offset"] == (run_dir / "metrics.jsonl").stat().st_size
    return run_dir


def test_mlflow_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    track_two_starts("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("qvtune").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["adapter.rank"] == "16"
    for name, steps in (("step/loss", list(range(1, 41))), ("eval/loss", [0, 10, 20, 30, 40])):
        assert [one.step for one in client.get_metric_history(run.info.run_id, name)] == steps


def test_wandb_writes_both_starts_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = track_two_starts("wandb", tmp_path)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)
