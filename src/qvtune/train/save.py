"""Writing the checkpoints of a run, which goes on when a file system refuses one."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from safetensors import SafetensorError

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint import state as checkpoint_state
from qvtune.checkpoint.engine import gather_state
from qvtune.checkpoint.owner import Owner
from qvtune.checkpoint.state import TrainedState, TrainerState
from qvtune.config.schema import RunConfig
from qvtune.distributed import heartbeat, process_group
from qvtune.errors import StopRequested
from qvtune.train.early_stopping import followed_metric
from qvtune.train.prepare import Run
from qvtune.train.update_norms import update_norms

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Written:
    """What became of a checkpoint. ``failure``: why there is none."""

    bytes: int
    update_norms: dict[str, list[float]]
    failure: str | None = None


@dataclass
class _Writing:
    """A checkpoint that is being written; ``future`` is on rank 0 alone."""

    step: int
    blocked_seconds: float
    future: "Future[_Written] | None"
    is_told: bool = False


class Saves:
    """The checkpoints of a run, gathered on all ranks together and written by rank 0 in the background.

    Ranks agree about the outcome where they meet next: at the next checkpoint, or in ``finish``.
    """

    def __init__(self, run: Run, config: RunConfig, record: Callable[..., None]) -> None:
        self._run, self._config, self._record = run, config, record
        self._saved_step = run.state.step if run.resume else None
        self._num_failed = 0  # in a row
        self._writing: _Writing | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # what it works on is completed before Python exits

    @property
    def is_saved(self) -> bool:
        """Whether the state as it is now is in a checkpoint. One that is being written does not count."""
        return self._saved_step == self._run.state.step

    def save(self, say: Say, *, is_last: bool = False) -> None:
        """Gather a checkpoint on rank 0, which writes a copy while training goes on; collective.

        Raises StopRequested as ``finish``, which is called for the checkpoint before, and RuntimeError on rank 0 where
        training cannot go on from the state.
        """
        self.finish(say, is_last=is_last)
        started, run, step = monotonic(), self._run, self._run.state.step
        heartbeat.beat(f"checkpoint of step {step}")
        gathered = gather_state(run.engine)
        future = None
        if run.owner is not None:
            checkpoint_state.require_sound(gathered, step)
            copied = deepcopy(run.state)
            future = self._thread.submit(self._write, run.owner, gathered, copied, followed(run, self._config))
        self._writing = _Writing(step, monotonic() - started, future)

    def check(self, say: Say) -> None:
        """Tell of the checkpoint that is being written once it is there. Raises, on rank 0, what has ended its writing.

        That is anything but a file system's refusal.
        """
        one = self._writing
        if one is not None and one.future is not None and one.future.done():
            self._tell(one, one.future.result(), say)

    def finish(self, say: Say, *, is_last: bool = False) -> None:
        """Wait until the last checkpoint is written, verified and named by ``latest``; collective.

        Where it cannot be written (no space, quota, a file system that is read-only or away) earlier checkpoints stay
        and training goes on. Raises StopRequested when ``checkpoint.max_failed_saves`` in a row have failed, unless
        the next one ``is_last``.
        """
        one, failure = self._writing, None
        if one is None:
            return
        if one.future is not None:
            started = monotonic()
            heartbeat.beat(f"writing of the checkpoint of step {one.step}")
            result = one.future.result()
            one.blocked_seconds += monotonic() - started
            self._tell(one, result, say)
            failure = result.failure
        failure, self._writing = process_group.broadcast_object(failure), None
        if failure is None:
            self._saved_step, self._num_failed = one.step, 0
            return
        self._num_failed += 1
        if self._num_failed >= self._config.checkpoint.max_failed_saves and not is_last:
            raise StopRequested(f"stopped: {self._num_failed} checkpoints in a row could not be written")

    def mark_best(self, say: Say) -> None:
        """On rank 0 let ``checkpoints/best`` follow the metric of the task, or ``train.best_metric``.

        Waits for the checkpoint that is being written, which may be the best. What the file system refuses is said, and
        tried again with the next checkpoint.
        """
        if self._run.owner is not None:
            if self._writing is not None and self._writing.future is not None:
                self._writing.future.result()
            try:
                self._mark_best(self._run.owner, followed(self._run, self._config))
            except OSError as error:
                say(
                    f"step {self._run.state.step}: checkpoints/best stays as it was, until the next checkpoint: {error}"
                )

    def _mark_best(self, owner: Owner, values: dict[int, float]) -> None:
        _, higher_is_better = followed_metric(self._config.train, self._run.plan.task)
        with owner.writing() as workspace:
            checkpoint_folder.mark_best(self._checkpoints, values, higher_is_better, workspace)

    def _tell(self, one: _Writing, result: _Written, say: Say) -> None:
        if one.is_told:
            return
        one.is_told = True
        if result.failure is None:
            say(f"step {one.step}: checkpoint {checkpoint_folder.step_folder(self._checkpoints, one.step)}")
            fields = {"bytes": result.bytes, "blocked_seconds": one.blocked_seconds}
            norms = {"update_norms": result.update_norms} if result.update_norms else {}
            self._record("checkpoint", step=one.step, **fields, **norms)
            return
        count = f"{self._num_failed + 1} of checkpoint.max_failed_saves={self._config.checkpoint.max_failed_saves}"
        say(f"step {one.step}: no checkpoint ({count}): {result.failure}")
        self._record("save_failed", step=one.step, problem=result.failure)

    @property
    def _checkpoints(self) -> Path:
        return self._run.run_dir / "checkpoints"

    def _write(self, owner: Owner, gathered: TrainedState, state: TrainerState, values: dict[int, float]) -> _Written:
        """On rank 0, in the background."""
        peft_config = getattr(self._run.engine.module.model, "peft_config", {}).get("default")

        def write_files(folder: Path) -> None:
            try:
                checkpoint_state.save(folder, gathered, peft_config, state, self._run.fingerprint)
            except SafetensorError as error:  # its way to pass on an OSError
                raise OSError(str(error)) from error
            checkpoint_state.require_written(folder, gathered)

        try:
            with owner.writing() as workspace:
                size = checkpoint_folder.write(self._checkpoints, state.step, write_files, workspace)
                self._mark_best(owner, values)
                checkpoint_folder.prune(self._checkpoints, self._config.checkpoint.keep, workspace)
        except OSError as error:
            return _Written(0, {}, _why_not(error, self._checkpoints, gathered))
        return _Written(size, update_norms(gathered, self._config.adapter))


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


def followed(run: Run, config: RunConfig) -> dict[int, float]:
    """Step -> the metric that is followed, of all evaluations so far that have it."""
    name, _ = followed_metric(config.train, run.plan.task)
    return {step: metrics[name] for step, metrics in run.state.evaluations.items() if name in metrics}
