"""What a merge did, for people and as merge_report.json."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from qvtune.merge.proof import Proof
from qvtune.merge.tensors import MatrixUpdate
from qvtune.report.console import console


@dataclass(frozen=True)
class MergeReport:
    """Where the model comes from, what was done to it, and how it compares with base and adapter.

    ``trained_on`` is the run's ``model.quantization``. ``tensors`` counts adapted, dequantized and copied ones;
    ``bytes`` are theirs.
    """

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
    proof: Proof
    seconds: float


def show(report: MergeReport, output: Path) -> None:
    """Print the proof and the size of the updates."""
    proof, limits = report.proof, report.proof.limits
    table = Table(title=f"{output}: merged against base + adapter, {proof.positions} positions", title_justify="left")
    for heading in ("", "measured", "allowed"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("top-1 agreement", f"{proof.top1_agreement:.2%}", f">= {limits.top1_agreement:.0%}")
    bound = "" if limits.max_abs_difference is None else f"<= {limits.max_abs_difference:.0e}"
    table.add_row("largest difference of logits", f"{proof.max_abs_difference:.2e}", bound)
    table.add_row("mean difference of logits", f"{proof.mean_abs_difference:.2e}")
    table.add_row("mean KL(adapted || merged)", f"{proof.mean_kl:.2e} nats", f"<= {limits.mean_kl:.0e}")
    for module, updates in _by_module(report.updates).items():
        ratios = sorted(update.ratio for update in updates)
        spread = f"{ratios[0]:.1e} .. {median(ratios):.1e} .. {ratios[-1]:.1e}"
        table.add_row(f"norm of update / weight, {len(ratios)} {module}", spread)
    out = console()
    out.print(table)
    if report.base_weights == "original" and report.trained_on == "nf4":
        out.print("note: the adapter was trained against NF4 values; on the original weights it may act otherwise")


def _by_module(updates: Iterable[MatrixUpdate]) -> dict[str, list[MatrixUpdate]]:
    """The updates of ``q_proj``, of ``v_proj``, ..."""
    groups: dict[str, list[MatrixUpdate]] = {}
    for update in updates:
        groups.setdefault(update.name.split(".")[-2], []).append(update)
    return groups
