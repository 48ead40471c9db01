"""The settings of what a run shows of itself: section ``report``."""

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from qvtune.config.section import PositiveNumber, Section

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class ReportSection(Section):
    """What follows a run in processes of low priority of their own, which can neither stop nor slow it."""

    html: bool = Field(default=True, description="keep run_dir/report.html up to date while the run goes on")
    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",),
        description="where else numbers are shown; wandb and mlflow are packages to be installed, which take their "
        "settings from WANDB_* and MLFLOW_* variables",
    )
    project: str = Field(
        default="qvtune",
        min_length=1,
        description="the project of wandb, the experiment of mlflow; the run is called as its folder",
    )
    wait_seconds: PositiveNumber = Field(
        default=30.0,
        description="at its end a run waits at most so many seconds until the report is complete and trackers have "
        "everything; the rest is sent at the next start",
    )

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(trackers)) != len(trackers):
            raise PydanticCustomError("repeated", "must name each tracker once")
        return trackers
