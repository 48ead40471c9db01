"""The attention of a study's runs, as ``qvtune.study.attention`` has measured it: figure, table and CSV rows."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvtune.report.drawing import drawing, finished
from qvtune.report.page import Figure, Table, Value
from qvtune.study.results import Result
from qvtune.study.tables import Rows, name_of

ATTENTION_FILE = "attention.csv"
MEASURES = {"entropy_change": "change of entropy", "kl": "KL from the base", "js": "Jensen-Shannon from the base"}
_COLUMNS = 4  # runs beside each other


def attention_of(results: Sequence[Result]) -> dict[str, dict[str, np.ndarray]]:
    """Name of a cell -> measure -> [layers, heads]; of those that have been measured."""
    paths = {one.cell.name: one.folder / ATTENTION_FILE for one in results}
    return {name: _read(path) for name, path in paths.items() if path.is_file()}


def _read(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shape = int(rows[-1]["layer"]) + 1, int(rows[-1]["head"]) + 1
    names = [name for name in rows[0] if name not in ("layer", "head")]
    return {name: np.array([float(row[name]) for row in rows]).reshape(shape) for name in names}


def attention_parts(results: Sequence[Result]) -> tuple[list[str | Table | Figure], Rows]:
    """Parts of a section, and the numbers behind them; empty where no run has been measured."""
    found = attention_of(results)
    measured = [one for one in results if one.cell.name in found]
    if not measured:
        return [], []
    table_rows: list[list[str | Value]] = []
    for one in measured:
        values = found[one.cell.name]
        label: list[str | Value] = [one.task, name_of(one.family), f"{one.ratio:g}", f"{one.eta_qk:g}", str(one.seed)]
        means = [f"{values['entropy_base'].mean():.4f}", f"{values['entropy_change'].mean():+.4f}"]
        table_rows.append([*label, *means, *(f"{values[name].mean():.3g}" for name in ("kl", "js"))])
    headings = ["task", "trained", "lambda", "eta_QK", "seed", "entropy of the base", *MEASURES.values()]
    table = Table("Means over layers and heads, nats", headings, table_rows, num_labels=5)
    rows: Rows = [
        {"cell": name, "layer": layer, "head": head} | {key: float(one[layer, head]) for key, one in values.items()}
        for name, values in found.items()
        for layer, head in np.ndindex(values["kl"].shape)
    ]
    return [_figure(measured, found), table], rows


def _figure(measured: Sequence[Result], found: dict[str, dict[str, np.ndarray]]) -> Figure:
    """A row of panels per measure, with one scale for all runs."""
    columns = min(len(measured), _COLUMNS)
    blocks = math.ceil(len(measured) / columns)
    with drawing(max(3.0 * columns + 0.8, 6.0), 2.6 * blocks * len(MEASURES)) as canvas:
        axes = canvas.subplots(blocks * len(MEASURES), columns, squeeze=False)
        for number, (measure, title) in enumerate(MEASURES.items()):
            largest = max(float(np.abs(found[one.cell.name][measure]).max()) for one in measured) or 1.0
            signed = measure == "entropy_change"
            scale: dict[str, Any] = {"cmap": "RdBu_r" if signed else "viridis", "vmax": largest}
            scale["vmin"] = -largest if signed else 0.0
            own = axes[number * blocks : (number + 1) * blocks].ravel()
            for axis, one in zip(own, measured, strict=False):
                image = axis.imshow(found[one.cell.name][measure], aspect="auto", origin="lower", **scale)
                heading = f"{name_of(one.family)}, lambda {one.ratio:g}\n{title}"
                axis.set(title=heading, xlabel="head", ylabel="layer")
                axis.title.set_fontsize(8.5)
                axis.grid(visible=False)
            for axis in own[len(measured) :]:
                axis.set_visible(False)
            canvas.colorbar(image, ax=list(own), fraction=0.03, pad=0.02)
        caption = (
            "Attention by layer and head beside the base's, on the same rows, nats: change of the entropy (red: more "
            "even, blue: sharper), Kullback-Leibler and Jensen-Shannon divergence."
        )
        return finished(canvas, "attention", caption)
