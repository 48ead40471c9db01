"""The settings of what a run shows of itself: section ``report``."""

from pydantic import Field

from qvtune.config.section import PositiveNumber, Section


class ReportSection(Section):
    """What follows a run in processes of low priority of their own, which can neither stop nor slow it."""

    html: bool = Field(default=True, description="keep run_dir/report.html up to date while the run goes on")
    wait_seconds: PositiveNumber = Field(
        default=30.0, description="at its end a run waits at most so many seconds until its report is complete"
    )
