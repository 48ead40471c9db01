"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint import state as checkpoint_state
from qvtune.cluster import distributed
from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.data.batch import Batch, collate
from qvtune.data.order import rows_of_step
from qvtune.memory import peak_rss_bytes
from qvtune.optim.schedule import multiplier
from qvtune.report.console import StepDisplay
from qvtune.report.metrics import MetricsLog
from qvtune.train.evaluate import evaluate
from qvtune.train.isolation import check_isolation
from qvtune.train.prepare import Run, prepare
from qvtune.train.stop import StopRequest

EXIT_DONE, EXIT_STOPPED = 0, 75
Record = Callable[..., None]  # event, fields -> metrics.jsonl


def train_from_file(path: Path, overrides: Sequence[str]) -> int:
    """``train`` with a recipe and the command line's overrides."""
    with distributed.together():
        config = load_config(path, overrides)
    return train(config)


def train(config: RunConfig) -> int:
    """Run to ``max_steps`` or to a request to stop; collective. Returns the exit code.

    The loss is the cross entropy summed over the label tokens of an optimizer step and divided by their number over all
    micro-batches and ranks, so it does not depend on how the rows are split.
    """
    stop = StopRequest()
    run = prepare(config)
    engine, state, max_steps = run.engine, run.state, run.plan.max_steps
    settings, rows, world_size = config.train, run.plan.rows, distributed.world_size()
    accumulation = engine.gradient_accumulation_steps()
    last_step = min(max_steps, settings.stop_after_step or max_steps)
    run_started, stopping = time.monotonic(), 0.0
    metrics = MetricsLog(run.run_dir, state.step + 1) if distributed.is_main() else None

    def record(event: str, **fields: object) -> None:
        if metrics is not None:
            metrics.write(event, **fields)

    record(
        "run_start",
        step=state.step,
        max_steps=max_steps,
        world_size=world_size,
        resumed_from=str(run.plan.resume or ""),
    )
    record("base_loaded", **_largest(vars(run.load)))
    with StepDisplay(state.step, max_steps, visible=distributed.is_main()) as display:
        if state.step >= last_step:
            display.say(f"step {state.step} of {last_step} is done already: nothing to train")
        elif config.data.packing:
            display.say(check_isolation(engine, next(_micro_batches(run, config, state.step)), run.plan.dtype))
        if state.step == 0:
            _evaluate(run, config, display, record)

        while state.step < last_step and not stopping:
            started = time.monotonic()
            lr = {}
            for group in engine.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier(state.step, max_steps, config.schedule)
                lr[group["name"]] = group["lr"]
            row_ids = rows_of_step(state.step, settings.global_batch_size, len(rows), settings.seed)
            tokens, label_tokens = int(rows.num_tokens[row_ids].sum()), int(rows.num_label_tokens[row_ids].sum())
            # Dropout depends on the step and the rank, not on history: a resumed run draws the same masks.
            torch.manual_seed((settings.seed * 1_000_003 + state.step) * 65_537 + distributed.rank())

            loss_sum = 0.0
            for micro_step, batch in enumerate(_micro_batches(run, config, state.step), start=1):
                summed = engine(batch)
                # DeepSpeed averages over micro-batches and ranks; wanted: the sum over the global label tokens.
                engine.backward(summed * (accumulation * world_size / label_tokens))
                loss_sum += summed.item()
                if micro_step == accumulation:
                    loss_sum, stopping = distributed.sum_over_ranks(loss_sum, float(bool(stop)))
                    _require_finite("loss", loss_sum, state.step + 1)
                engine.step()
            # In bfloat16 DeepSpeed leaves out a step whose gradients are not finite, and says so here alone.
            grad_norm = math.nan if engine.skipped_steps else float(engine.get_global_grad_norm())
            _require_finite("gradient norm", grad_norm, state.step + 1)

            state.step += 1
            state.tokens += tokens
            state.label_tokens += label_tokens
            loss, seconds = loss_sum / label_tokens, time.monotonic() - started
            display.step(state.step, loss, tokens / seconds, grad_norm, lr)
            counts = {"tokens": tokens, "label_tokens": label_tokens}
            record("step", step=state.step, loss=loss, **counts, seconds=seconds, grad_norm=grad_norm, lr=lr)

            if state.step == max_steps or _due(state.step, settings.eval_every):
                _evaluate(run, config, display, record)
            if state.step == last_step or stopping or _due(state.step, settings.save_every):
                _save(run, config, display, record)

        completed = state.step >= max_steps
        peak = _largest({"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": _peak_device_bytes()})
        reason, seconds = "completed" if completed else "stopped", time.monotonic() - run_started
        record("run_end", step=state.step, reason=reason, seconds=seconds, **peak)
    if metrics is not None:
        metrics.close()
    return EXIT_DONE if completed else EXIT_STOPPED


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _require_finite(what: str, value: float, step: int) -> None:
    """``value`` is the same on all ranks, so all leave together."""
    if not math.isfinite(value):
        raise RuntimeError(f"step {step}: the {what} is {value}; this step is in no checkpoint")


def _micro_batches(run: Run, config: RunConfig, step: int) -> Iterator[Batch]:
    """This rank's micro-batches of an optimizer step: ranks take turns in the global order of rows."""
    rows, size, world_size = run.plan.rows, config.train.micro_batch_size, distributed.world_size()
    row_ids = rows_of_step(step, config.train.global_batch_size, len(rows), config.train.seed)
    for start in range(distributed.rank() * size, len(row_ids), world_size * size):
        batch = collate([rows[int(row)] for row in row_ids[start : start + size]], run.plan.pad_token_id)
        yield batch.to(run.engine.device)


def _evaluate(run: Run, config: RunConfig, display: StepDisplay, record: Record) -> None:
    if run.plan.eval_rows is None:
        return
    loss, seconds = evaluate(run.engine, run.plan.eval_rows, config.train.micro_batch_size, run.plan.pad_token_id)
    run.state.eval_losses[run.state.step] = loss
    display.say(f"step {run.state.step}: evaluation loss {loss:.4f} ({seconds:.1f} s)")
    record("eval", step=run.state.step, loss=loss, seconds=seconds)


def _save(run: Run, config: RunConfig, display: StepDisplay, record: Record) -> None:
    """Write a checkpoint; all ranks gather, rank 0 writes, all go on when it is complete."""
    started = time.monotonic()
    gathered = checkpoint_state.gather_state(run.engine)
    checkpoints = run.run_dir / "checkpoints"
    size = 0
    if distributed.is_main():
        peft_config = run.engine.module.model.peft_config["default"]
        size = checkpoint_folder.write(
            checkpoints,
            run.state.step,
            lambda folder: checkpoint_state.save(folder, gathered, peft_config, run.state, run.fingerprint),
        )
        checkpoint_folder.prune(checkpoints, config.checkpoint.keep)
    distributed.barrier()
    seconds = time.monotonic() - started
    display.say(f"step {run.state.step}: checkpoint {checkpoint_folder.step_folder(checkpoints, run.state.step)}")
    record("checkpoint", step=run.state.step, bytes=size, blocked_seconds=seconds)


def _largest(values: dict[str, float]) -> dict[str, float]:
    return dict(zip(values, distributed.max_over_ranks(*values.values()), strict=True))


def _peak_device_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
