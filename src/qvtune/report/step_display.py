"""Console output of a run: one line per step and, on a terminal, a progress bar below."""

from types import TracebackType
from typing import Self

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qvtune.console import console


class StepDisplay:
    """Step lines and progress bar; prints nothing if ``visible`` is false (ranks other than 0)."""

    def __init__(self, first_step: int, max_steps: int, visible: bool) -> None:
        self._max_steps = max_steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console(),
            disable=not visible,
            transient=True,
        )
        self._task = self._progress.add_task("steps", total=max_steps, completed=first_step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: RenderableType) -> None:
        """Print a line, or a table, above the bar."""
        if not self._progress.disable:
            self._progress.console.print(text)

    def step(self, step: int, loss: float, tokens_per_second: float, grad_norm: float, lr: dict[str, float]) -> None:
        """Print one optimizer step: loss (nats per label token), speed, learning rate of each group, remaining time."""
        self._progress.update(self._task, completed=step)
        rates = "  ".join(f"{name} {rate:.2e}" for name, rate in lr.items())
        remaining = self._progress.tasks[self._task].time_remaining
        left = "" if remaining is None else f"  left {int(remaining) // 60}:{int(remaining) % 60:02d}"
        count = f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}"
        self.say(
            f"{count}  loss {loss:.4f}  {tokens_per_second:7.1f} tokens/s  grad norm {grad_norm:.3f}  lr {rates}{left}"
        )
