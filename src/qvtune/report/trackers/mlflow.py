"""MLflow, which reads its own settings from ``MLFLOW_*`` variables (MLFLOW_TRACKING_URI: a server or a folder)."""

import re
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from qvtune.report.trackers.tracker import Point, Tracked

_MAX_METRICS, _MAX_PARAMS, _MAX_CHARACTERS = 1000, 100, 500  # in a request; of a value
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")  # in a name
_KEY = "qvtune.key"
_STATUS = {"completed": "FINISHED", "stopped": "KILLED", None: "FAILED"}


class Mlflow:
    """A run of MLflow in the experiment ``project``, with the key of ours as a tag. What is answered is stored."""

    confirms, forgets = True, False

    def __init__(self, run: Tracked) -> None:
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        place = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([place], f"tags.`{_KEY}` = '{run.key}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(place, tags={_KEY: run.key}, run_name=run.run_dir.resolve().name)
        self._id = created.info.run_id
        params = [Param(_name(key), str(value)[:_MAX_CHARACTERS]) for key, value in run.config.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])

    def log(self, points: Sequence[Point]) -> None:
        """Store numbers."""
        metrics = [
            Metric(_name(name), value, round(point.time * 1000), point.step)
            for point in points
            for name, value in point.numbers.items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MAX_METRICS])

    def forget_after(self, step: int) -> None:
        """MLflow takes nothing back."""

    def close(self, reason: str | None) -> None:
        """Store how the run has ended."""
        self._client.set_terminated(self._id, _STATUS.get(reason, "FAILED"))


def _name(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name)
