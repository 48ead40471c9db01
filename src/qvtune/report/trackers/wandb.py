"""Weights & Biases, which reads its own settings from ``WANDB_*`` variables (WANDB_MODE=offline without a network)."""

from collections.abc import Sequence

import wandb

from qvtune.report.trackers.tracker import Point, Tracked


class Wandb:
    """A run of wandb with the key of ours, in ``project``. Its process sends in the background.

    A line of metrics.jsonl is a step of wandb, so that what the server has already is not sent again.
    """

    confirms, forgets = False, False

    def __init__(self, run: Tracked) -> None:
        self._run = wandb.init(
            project=run.project,
            name=run.run_dir.resolve().name,
            id=run.key,
            dir=str(run.run_dir),
            config=dict(run.config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="optimizer_step")

    def log(self, points: Sequence[Point]) -> None:
        """Hand numbers to wandb's process."""
        for point in points:
            if point.line >= self._run.starting_step:
                self._run.log({**point.numbers, "optimizer_step": point.step}, step=point.line)

    def forget_after(self, step: int) -> None:
        """wandb takes nothing back."""

    def close(self, reason: str | None) -> None:
        """Wait until all of it is sent, or written where WANDB_MODE is offline."""
        self._run.finish(exit_code=1 if reason is None else 0)
