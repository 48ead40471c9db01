"""Writing the checkpoints of a run, which goes on when a file system refuses one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from safetensors import SafetensorError

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint import state as checkpoint_state
from qvtune.checkpoint.engine import gather_state
from qvtune.checkpoint.state import TrainedState
from qvtune.config.schema import RunConfig
from qvtune.distributed import heartbeat, process_group
from qvtune.errors import StopRequested
from qvtune.train.early_stopping import followed_metric
from qvtune.train.prepare import Run

Say = Callable[[str], None]


class Saves:
    """The checkpoints of a run, written on all ranks together."""

    def __init__(self, run: Run, config: RunConfig, record: Callable[..., None]) -> None:
        self._run, self._config, self._record = run, config, record
        self._saved_step = run.state.step if run.resume else None
        self._num_failed = 0  # in a row

    @property
    def is_saved(self) -> bool:
        """Whether the state as it is now is in a checkpoint."""
        return self._saved_step == self._run.state.step

    def save(self, say: Say, *, is_last: bool = False) -> None:
        """Write a checkpoint: gathered on rank 0, which writes; collective.

        Where it cannot be written (no space, quota, a file system that is read-only or away) earlier checkpoints stay
        and training goes on. Raises StopRequested when ``checkpoint.max_failed_saves`` in a row have failed, unless
        this ``is_last``.
        """
        started, step = monotonic(), self._run.state.step
        heartbeat.beat(f"checkpoint of step {step}")
        gathered = gather_state(self._run.engine)
        size, failure = process_group.broadcast_object(self._write(gathered) if self._run.owner is not None else None)
        if failure is None:
            self._saved_step, self._num_failed = step, 0
            say(f"step {step}: checkpoint {checkpoint_folder.step_folder(self._checkpoints, step)}")
            self._record("checkpoint", step=step, bytes=size, blocked_seconds=monotonic() - started)
            return
        self._num_failed += 1
        most = self._config.checkpoint.max_failed_saves
        say(f"step {step}: no checkpoint ({self._num_failed} of checkpoint.max_failed_saves={most}): {failure}")
        self._record("save_failed", step=step, problem=failure)
        if self._num_failed >= most and not is_last:
            raise StopRequested(f"stopped: {self._num_failed} checkpoints in a row could not be written")

    @property
    def _checkpoints(self) -> Path:
        return self._run.run_dir / "checkpoints"

    def _write(self, gathered: TrainedState) -> tuple[int, str | None]:
        """On rank 0: the bytes of the checkpoint, or why there is none."""
        run, owner = self._run, self._run.owner
        assert owner is not None
        checkpoint_state.require_sound(gathered, run.state.step)
        peft_config = getattr(run.engine.module.model, "peft_config", {}).get("default")

        def write_files(folder: Path) -> None:
            try:
                checkpoint_state.save(folder, gathered, peft_config, run.state, run.fingerprint)
            except SafetensorError as error:  # its way to pass on an OSError
                raise OSError(str(error)) from error

        try:
            with owner.writing() as workspace:
                size = checkpoint_folder.write(self._checkpoints, run.state.step, write_files, workspace)
                mark_best(run, self._config)
                checkpoint_folder.prune(self._checkpoints, self._config.checkpoint.keep, workspace)
        except OSError as error:
            return 0, _why_not(error, self._checkpoints, gathered)
        return size, None


def _why_not(error: OSError, checkpoints: Path, gathered: TrainedState) -> str:
    """What went wrong, the room that a checkpoint needs, and what may be deleted for it."""
    needed = sum(tensor.nbytes for entry in gathered.values() for tensor in entry.values())
    try:
        free = shutil.disk_usage(checkpoints).free
        older = [path.name for path in checkpoint_folder.complete_checkpoints(checkpoints)[:-1]]
    except OSError as unreadable:
        return f"{error}; and {checkpoints} cannot be read ({unreadable})."
    advice = f" To make room delete {', '.join(older)} there, or lower checkpoint.keep." if older else ""
    return f"{error}. It needs about {needed:,} bytes, {free:,} are free in {checkpoints}.{advice}"


def mark_best(run: Run, config: RunConfig) -> None:
    """On rank 0 let ``checkpoints/best`` follow the metric of the task, or ``train.best_metric``."""
    if run.owner is not None:
        _, higher_is_better = followed_metric(config.train, run.plan.task)
        with run.owner.writing() as workspace:
            checkpoint_folder.mark_best(run.run_dir / "checkpoints", followed(run, config), higher_is_better, workspace)


def followed(run: Run, config: RunConfig) -> dict[int, float]:
    """Step -> the metric that is followed, of all evaluations so far that have it."""
    name, _ = followed_metric(config.train, run.plan.task)
    return {step: metrics[name] for step, metrics in run.state.evaluations.items() if name in metrics}
