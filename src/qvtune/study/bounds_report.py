"""Theorem 1 for a recipe, as text: bounds, whether they say anything, and the gaps that a run has measured."""

import math
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.errors import UserError
from qvtune.report.metrics import read_metrics
from qvtune.study.bounds import QKV, QV, Bound, bounds
from qvtune.tasks.glue import glue_settings
from qvtune.train.checks import Checks
from qvtune.train.data import count_training_rows, with_labels

_LAST_STEPS = 100  # over which training losses are averaged, at most a tenth of all


def print_bounds(run: RunConfig, num_rows: int | None, bits: int, run_dir: Path | None) -> None:
    """Print Theorem 1 for ``run``. ``num_rows``: None where the training rows are to be read and counted.

    ``run_dir``: a run whose gap between training and evaluation is shown beside it.
    Raises UserError for what cannot be read, and for a run with other settings than the recipe's.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on standard output that it found no GPU
    gaps = [] if run_dir is None else measured_gaps(run, run_dir)
    run, num_rows = (_with_known_labels(run), num_rows) if num_rows is not None else _counted(run)
    found, out = bounds(run, num_rows, bits), console()
    out.print(_table(found, num_rows, bits))
    for line in [*_comments(found, run), *gaps]:
        out.print(line, markup=False, soft_wrap=True)


def _with_known_labels(run: RunConfig) -> RunConfig:
    """With the labels of GLUE's task, without a look at any row."""
    names = {source.glue for source in run.data.train_sources} - {None}
    if run.task == "causal_lm" or len(names) != 1:
        return run
    return run.model_copy(update={"classification": glue_settings(run.classification, str(names.pop()))})


def _counted(run: RunConfig) -> tuple[RunConfig, int]:
    checks = Checks()
    run = with_labels(run, checks)
    checks.raise_all()
    return run, count_training_rows(run)


def _table(found: list[Bound], num_rows: int, bits: int) -> Table:
    table = Table(
        title=f"Theorem 1: N = {num_rows:,} training rows, q = {bits} bits a parameter, loss within a range of 1"
    )
    table.add_column("projections")
    for title in ("parameters", "head", "bound, paper's form", "bound, sqrt(2 R² q P / N)", "with the head"):
        table.add_column(title, justify="right")
    for one in found:
        paper = "not defined" if one.paper is None else _shown(one.paper)
        counts = f"{one.parameters:,}", f"{one.head:,}"
        table.add_row(" ".join(one.projections), *counts, paper, _shown(one.adapters_only), _shown(one.with_head))
    return table


def _shown(bound: float) -> str:
    return f"{bound:.3g} vacuous" if bound >= 1 else f"{bound:.3g}"


def _comments(found: list[Bound], run: RunConfig) -> list[str]:
    of = {frozenset(one.projections): one for one in found}
    qv, qkv = of[frozenset(QV)], of[frozenset(QKV)]
    lines = [
        f"Ratio QV / QKV of the bounds {qv.adapters_only / qkv.adapters_only:.3f}, of the parameters "
        f"{qv.parameters / qkv.parameters:.3f}; with the head {qv.with_head / qkv.with_head:.3f}. It is all that the "
        "theorem says of the two where both are vacuous."
    ]
    if qv.paper is None:
        lines.append("The paper's form is for low-rank factors where W_q, W_k and W_v have one shape.")
    if any(one.with_head >= 1 for one in found):
        lines.append("vacuous: not below the range of the loss, so the theorem promises nothing about this run.")
    what = {"single_label": "the share of wrong classes", "regression": "squared errors, if cut off at 1 after scaling"}
    loss = what[run.classification.problem] if run.task != "causal_lm" else "the share of wrong label tokens of a row"
    lines.append(
        f"A loss within a range of 1 (R = 1/2) is here {loss}. Cross entropy has no bound, nor does the theorem for it."
    )
    return lines


def measured_gaps(run: RunConfig, run_dir: Path) -> list[str]:
    """Training and evaluation of the run in ``run_dir`` at its last evaluation, and their difference.

    An evaluation set called ``train`` is taken for training rows: of the same model, in all metrics. Otherwise there is
    the loss of the last training steps, whose weights still changed and whose dropout was on.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} is no run folder (no metrics.jsonl)", setting="--run")
    _require_same_settings(run, run_dir)
    evaluations = [one for one in read_metrics(run_dir, "eval") if one["step"]]
    if not evaluations:
        raise UserError(f"{run_dir}: no evaluation after a step of training (data.eval)", setting="--run")
    last = evaluations[-1]
    sets = dict(last.get("sets") or {"eval": last})
    trained = sets.pop("train", None)
    lines = []
    for name, values in sets.items():
        if trained is not None:
            lines += [_gap(name, metric, trained[metric], values[metric]) for metric in values if metric in trained]
        else:
            loss, steps = _training_loss(run_dir, last["step"])
            lines.append(
                _gap(name, "loss", loss, values["loss"]) + f" (mean over the last {steps} steps, while training)"
            )
    if trained is None:
        lines.append(
            "For the gap of the trained model, in all metrics, name two sets: data.eval='{train: ..., test: ...}'."
        )
    return [f"Measured by {run_dir} after step {last['step']}:", *(f"  {line}" for line in lines)]


def _gap(name: str, metric: str, trained: float, held_out: float) -> str:
    return f"{metric}: training {trained:.4g}, {name} {held_out:.4g}, difference {held_out - trained:+.4g}"


def _training_loss(run_dir: Path, step: int) -> tuple[float, int]:
    """Nats per label, and over how many steps up to ``step``."""
    steps = [one for one in read_metrics(run_dir, "step") if one["step"] <= step]
    steps = steps[-min(_LAST_STEPS, math.ceil(len(steps) / 10)) :]
    labels = sum(one["label_tokens"] for one in steps)
    return sum(one["loss"] * one["label_tokens"] for one in steps) / labels, len(steps)


def _require_same_settings(run: RunConfig, run_dir: Path) -> None:
    """What decides parameters and rows must be that of the recipe."""
    other = load_config(run_dir / "config.yaml")
    pairs: dict[str, tuple[Any, Any]] = {
        "task": (run.task, other.task),
        "model.name_or_path": (run.model.name_or_path, other.model.name_or_path),
        "data.train": (run.data.train, other.data.train),
        **{f"adapter.{key}": (value, getattr(other.adapter, key)) for key, value in run.adapter},
    }
    different = [f"{key} is {theirs} there, {ours} here" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if different:
        raise UserError([f"{run_dir}: {one}; give {run_dir}/config.yaml as the recipe" for one in different], "--run")
