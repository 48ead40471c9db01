"""What a merge did, for people and as merge_report.json."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from qvtune.console import console
from qvtune.convert.merge.tensors import MatrixUpdate
from qvtune.convert.proof.compare import Difference
from qvtune.convert.proof.proof import Losses, Proof
from qvtune.convert.readers.check import ReaderCheck

_SHOWN = 5


@dataclass(frozen=True)
class MergeReport:
    """Where the model comes from, what was done to it, and how it compares with base and adapter.

    ``trained_on`` is the run's ``model.quantization``. ``tensors`` counts adapted, added, dequantized and copied ones;
    ``bytes`` are theirs. ``from_training``: how far this choice of base weights (``chosen``) and the ``other`` one are
    from what was trained; empty where there is no other. ``losses`` None: the proof had no rows with labels.
    ``kept``: the share of the updates that quantizing the merge has left; None where it was not. ``check``: of
    ``--check-with``.
    """

    format: str
    checkpoint: str
    step: int | None
    base: str
    base_weights: str
    trained_on: str
    dtype: str
    scaling: float | None
    files: list[str]
    bytes: int
    tensors: dict[str, int]
    updates: list[MatrixUpdate]
    kept: float | None
    proof: Proof
    from_training: dict[str, Difference]
    losses: Losses | None
    warnings: list[str]
    versions: dict[str, str]
    seconds: float
    check: ReaderCheck | None = None


def rounding_warnings(updates: Iterable[MatrixUpdate], dtype: str) -> list[str]:
    """One sentence where rounding to ``dtype`` loses updates of matrices."""
    lost = sorted((update for update in updates if update.lost), key=lambda update: update.kept)
    if not lost:
        return []
    examples = "; ".join(
        f"{update.name} keeps {update.kept:.0%} (update {update.update_norm:.1e}, rounding {update.rounding_norm:.1e})"
        for update in lost[:_SHOWN]
    )
    return [f"rounding to {dtype} loses the update of {len(lost)} matrices; use a wider --dtype: {examples}"]


def show(report: MergeReport, output: Path) -> None:
    """Print the proof and the size of the updates."""
    proof, limits = report.proof, report.proof.limits
    table = Table(
        title=f"{output}: {report.format} against base + adapter, {proof.positions} positions", title_justify="left"
    )
    for heading in ("", "measured", "allowed"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("top-1 agreement", f"{proof.top1_agreement:.2%}", f">= {limits.top1_agreement:.0%}")
    bound = "" if limits.max_abs_difference is None else f"<= {limits.max_abs_difference:.0e}"
    table.add_row("largest difference of logits", f"{proof.max_abs_difference:.2e}", bound)
    if limits.max_relative_difference is not None:
        share = proof.max_abs_difference / proof.largest_logit if proof.largest_logit else math.inf
        table.add_row("the same / largest logit", f"{share:.2e}", f"<= {limits.max_relative_difference:.0e}")
    table.add_row("mean difference of logits", f"{proof.mean_abs_difference:.2e}")
    table.add_row("mean KL(adapted || merged)", f"{proof.mean_kl:.2e} nats", f"<= {limits.mean_kl:.0e}")
    for name, difference in _by_choice(report).items():
        table.add_row(f"what was trained -> {name}", difference)
    if report.kept is not None:
        table.add_row("updates left after quantizing", f"{report.kept:.1%}", "100%")
    if report.losses is not None:
        losses = report.losses
        table.add_row("loss before, adapted, merged", f"{losses.before:.4f}, {losses.adapted:.4f}, {losses.merged:.4f}")
    for module, updates in _by_module(report.updates).items():
        table.add_row(f"norm of update / weight, {len(updates)} {module}", _spread(one.ratio for one in updates))
        rounded = [one.update_norm / one.rounding_norm for one in updates if one.rounding_norm]
        if rounded:
            table.add_row(f"norm of update / rounding, {len(rounded)} {module}", _spread(rounded))
    out = console()
    out.print(table)
    for warning in report.warnings:
        out.print(f"warning: {warning}")


def _by_choice(report: MergeReport) -> Mapping[str, str]:
    """What each choice of base weights costs, in words."""
    other = "original" if report.base_weights == "dequantized" else "dequantized"
    names = {"chosen": f"{report.base_weights} (this merge)", "other": f"{other} (the other choice)"}
    return {
        names[key]: f"top-1 {difference.top1_agreement:.2%}, KL {difference.mean_kl:.1e}"
        for key, difference in report.from_training.items()
    }


def _spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.1e} .. {median(ordered):.1e} .. {ordered[-1]:.1e}"


def _by_module(updates: Iterable[MatrixUpdate]) -> dict[str, list[MatrixUpdate]]:
    """The updates of ``q_proj``, of ``v_proj``, ..."""
    groups: dict[str, list[MatrixUpdate]] = {}
    for update in updates:
        groups.setdefault(update.name.split(".")[-2], []).append(update)
    return groups
