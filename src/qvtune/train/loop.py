"""The training loop."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qvtune.config.schema import RunConfig
from qvtune.data.batch import Batch
from qvtune.distributed import heartbeat, process_group
from qvtune.distributed.hang import watched
from qvtune.distributed.stop import StopRequest
from qvtune.errors import StopRequested
from qvtune.model.adapters import trainable
from qvtune.model.kept import KeptBase
from qvtune.model.layers import destroy_engine
from qvtune.optim.groups import count_trained
from qvtune.optim.schedule import multiplier
from qvtune.report.answers import answers_table
from qvtune.report.step_display import StepDisplay
from qvtune.system import peak_rss_bytes
from qvtune.tasks.metrics import Documents
from qvtune.train.batches import micro_batches
from qvtune.train.early_stopping import followed_metric, without_improvement
from qvtune.train.evaluate import as_text, evaluate_sets
from qvtune.train.generate import generate
from qvtune.train.isolation import check_isolation
from qvtune.train.not_finite import raise_not_finite
from qvtune.train.prepare import Run, prepare
from qvtune.train.recorder import Record, recorder
from qvtune.train.save import Saves, followed

EXIT_DONE = 0


def train(config: RunConfig, stop: StopRequest | None = None, kept: KeptBase | None = None) -> int:
    """Train until ``max_steps``, early stopping or a request to stop; collective. Returns the exit code.

    A rank that hangs ends all ranks, see qvtune/distributed/hang.py.

    The loss of an optimizer step is the sum over its label tokens divided by their number over all micro-batches and
    ranks, so it does not depend on how the rows are split.

    For several runs in one process: ``stop`` handles the signals of all of them (and ``train.max_hours`` is not looked
    at); ``kept`` keeps the base.
    Raises StopRequested when the request comes before the run folder is opened, when there is nothing to save.
    """
    with watched(Path(config.run_dir) / "logs", config.train.hang_seconds):
        return _train(config, stop or StopRequest(config.train.max_hours), kept)


def _train(config: RunConfig, stop: StopRequest, kept: KeptBase | None) -> int:
    run = prepare(config, stop, kept)
    with recorder(run, config) as record:
        try:
            code = _run(run, config, stop, record)
        except Exception as error:
            record("run_failed", step=run.state.step, error=f"{type(error).__name__}: {error}")
            raise
    destroy_engine(run.engine)
    return code


def _run(run: Run, config: RunConfig, stop: StopRequest, record: Record) -> int:
    state, max_steps, settings, rows = run.state, run.plan.max_steps, config.train, run.plan.rows
    last_step = state.step if _ends_early(run, config) else min(max_steps, settings.stop_after_step or max_steps)
    run_started, reason = time.monotonic(), "stopped"
    saves = Saves(run, config, record)

    _record_start(run, record)
    with StepDisplay(state.step, max_steps, visible=process_group.is_main()) as display:
        try:
            if state.step >= last_step:
                display.say(f"step {state.step} of {last_step} is complete already: nothing to train")
            elif config.data.packing:
                display.say(_check_isolation(run))
            _evaluate_and_generate(run, config, stop, display, record, saves)

            batches = micro_batches(run, config)
            while state.step < last_step:
                started = time.monotonic()
                lr = _set_learning_rates(run.engine, state.step, max_steps, config)
                row_ids = run.plan.order.of_step(state.step, settings.global_batch_size)
                tokens, label_tokens = int(rows.num_tokens[row_ids].sum()), int(rows.num_label_tokens[row_ids].sum())
                loss, grad_norm = _optimizer_step(run, config, stop, batches, label_tokens)

                state.step += 1
                state.tokens += tokens
                state.label_tokens += label_tokens
                seconds = time.monotonic() - started
                saves.check(display.say)
                display.step(state.step, loss, tokens / seconds, grad_norm, lr)
                counts = {"tokens": tokens, "label_tokens": label_tokens}
                own = {"seconds": seconds, "grad_norm": grad_norm, "lr": lr, **_peak_memory()}
                record("step", step=state.step, loss=loss, **counts, **own)

                _evaluate_and_generate(run, config, stop, display, record, saves)
                if _ends_early(run, config):
                    last_step = state.step
                    metric = followed_metric(settings, run.plan.task)[0]
                    display.say(f"step {state.step}: no better {metric} for {settings.early_stopping} evaluations")
                if state.step == last_step or _due(state.step, settings.save_every):
                    saves.save(display.say)
            saves.finish(display.say)
            if saves.is_saved and (state.step == max_steps or _ends_early(run, config)):
                reason = "completed"
        except StopRequested as request:
            # Gradients of an incomplete step are in no checkpoint: the step will be run again from its start.
            display.say(f"{request}: step {state.step} of {max_steps} is the last complete step")
            saves.finish(display.say, is_last=True)
            if not saves.is_saved:
                saves.save(display.say, is_last=True)
                saves.finish(display.say, is_last=True)

        peak = _largest(_peak_memory())
        record("run_end", step=state.step, reason=reason, seconds=time.monotonic() - run_started, **peak)
    return EXIT_DONE if reason == "completed" else StopRequested.exit_code


def _record_start(run: Run, record: Record) -> None:
    counts = {"step": run.state.step, "max_steps": run.plan.max_steps, "world_size": process_group.world_size()}
    damaged = {"damaged_checkpoints": run.damaged} if run.damaged else {}
    trained = dict(count_trained(trainable(run.engine.module)))
    record("run_start", **counts, resumed_from=str(run.resume or ""), trained_parameters=trained, **damaged)
    record("base_loaded", **_largest(vars(run.load)))


def _check_isolation(run: Run) -> str:
    plan = run.plan
    return check_isolation(run.engine, plan.task, plan.rows[0], plan.pad_token_id, plan.attention, plan.dtype)


def _set_learning_rates(engine: Any, step: int, max_steps: int, config: RunConfig) -> dict[str, float]:
    """Give each parameter group its learning rate for the step after ``step``; returns them by the group's name."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier(step, max_steps, config.schedule)
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def _optimizer_step(
    run: Run, config: RunConfig, stop: StopRequest, batches: Iterator[Batch], label_tokens: int
) -> tuple[float, float]:
    """Train on one global batch of ``label_tokens``; collective. Returns loss per label token, and gradient norm.

    The norm is that before clipping. Raises RuntimeError when one of the two is not finite.
    """
    engine, step, world_size = run.engine, run.state.step, process_group.world_size()
    accumulation = engine.gradient_accumulation_steps()
    # Dropout depends on the step and the rank alone, so a resumed run draws the same masks.
    torch.manual_seed((config.train.seed * 1_000_003 + step) * 65_537 + process_group.rank())

    stop.poll()
    losses: list[torch.Tensor] = []
    device_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for micro_step in range(1, accumulation + 1):
        heartbeat.beat(f"step {step + 1}, micro-batch {micro_step} of {accumulation}")
        if micro_step > 1:
            stop.poll_in_time()
        # DeepSpeed averages over micro-batches and ranks; wanted: the sum over the global label tokens.
        losses.append(train_on(next(batches), engine, accumulation * world_size / label_tokens))
        device_sum += losses[-1]
        if micro_step == accumulation:  # until here the host has not waited for the device
            (loss_sum,) = process_group.sum_over_ranks(device_sum.item())
            if not math.isfinite(loss_sum):
                raise_not_finite("loss", loss_sum, run, config, losses)
        engine.step()
    # In bfloat16 DeepSpeed skips a step whose gradients are not finite, and only this counter tells.
    grad_norm = math.nan if engine.skipped_steps else float(engine.get_global_grad_norm())
    if not math.isfinite(grad_norm):
        raise_not_finite("gradient norm", grad_norm, run, config, losses)
    return loss_sum / label_tokens, grad_norm


def train_on(batch: Batch, engine: Any, scale: float) -> torch.Tensor:
    """Forward and backward of a micro-batch; gradients are those of its summed loss times ``scale``.

    Returns the summed loss, a scalar on the device. The host does not wait for the device.
    """
    summed = engine(batch)
    engine.backward(summed * scale)
    loss: torch.Tensor = summed.detach()
    return loss


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate_and_generate(
    run: Run, config: RunConfig, stop: StopRequest, display: StepDisplay, record: Record, saves: Saves
) -> None:
    """What is due after a step of these two; ``checkpoints/best`` follows."""
    evaluated = _evaluate_if_due(run, config, stop, display, record)
    if _generate_if_due(run, config, stop, display, record) or evaluated:
        saves.mark_best(display.say)


def _evaluate_if_due(run: Run, config: RunConfig, stop: StopRequest, display: StepDisplay, record: Record) -> bool:
    """Before the first step, unless ``eval_at_start`` is off, after the last, and every ``eval_every`` steps; or where
    that was interrupted.

    Returns whether there are new metrics.
    """
    state, plan = run.state, run.plan
    is_due = state.step == plan.max_steps or _due(state.step, config.train.eval_every)
    if state.step == 0:
        is_due = config.train.eval_at_start
    if not plan.eval_sets or not is_due or "loss" in state.evaluations.get(state.step, {}):
        return False
    size = config.train.micro_batch_size
    heartbeat.beat(f"evaluation after step {state.step}")
    of_each: dict[str, Documents] | None = {name: {} for name in plan.eval_sets} if config.train.eval_rows else None
    found, seconds = evaluate_sets(run.engine, plan.task, plan.eval_sets, size, plan.pad_token_id, stop.poll, of_each)
    for name, documents in (of_each or {}).items():
        lists = {field: values.tolist() for field, values in documents.items()}
        record("eval_rows", step=state.step, set=name, **lists)
    first = dict(next(iter(found.values())))  # what `loss` is, and what `best` follows
    state.evaluations[state.step] = first
    display.say(f"step {state.step}: evaluation {as_text(found)} ({seconds:.1f} s)")
    record("eval", step=state.step, **first, seconds=seconds, **({"sets": found} if len(found) > 1 else {}))
    return True


def _generate_if_due(run: Run, config: RunConfig, stop: StopRequest, display: StepDisplay, record: Record) -> bool:
    """Before the first step, after the last, and every ``generate.every`` steps; or where that was interrupted.

    Returns whether there are new metrics.
    """
    state, plan, settings = run.state, run.plan, config.train.generate
    if settings is None or run.whole is None or state.generated_at == state.step:
        return False
    every = config.train.eval_every if settings.every is None else settings.every
    if not (state.step in (0, plan.max_steps) or _due(state.step, every) or _ends_early(run, config)):
        return False
    heartbeat.beat(f"generation after step {state.step}")
    found = generate(run.whole, run.engine, plan.prompts, settings, plan.tokenizer, stop)
    state.generated_at = state.step
    display.say(answers_table(state.step, found.fields()))
    record("generation", step=state.step, **found.fields())
    if found.exact_match is not None:
        state.evaluations.setdefault(state.step, {})["exact_match"] = found.exact_match
    return found.exact_match is not None


def _ends_early(run: Run, config: RunConfig) -> bool:
    """Whether the metric that is followed has not become better for ``train.early_stopping`` evaluations."""
    patience, values = config.train.early_stopping, followed(run, config)
    if patience is None or not values:
        return False
    return without_improvement(values, followed_metric(config.train, run.plan.task)[1]) >= patience


def _largest(values: dict[str, float]) -> dict[str, float]:
    return dict(zip(values, process_group.max_over_ranks(*values.values()), strict=True))


def _peak_memory() -> dict[str, float]:
    """Of this rank so far: of its process, and of what torch has allocated on its device."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": device}
