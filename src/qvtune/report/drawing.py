"""How the project's figures look, and how they become files: the same figure gives the same bytes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qvtune.report.page import Figure

# Okabe and Ito's colours, which stay apart for the colour-blind.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_SETTINGS: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6675",
    "axes.labelcolor": "#1d2530",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text as text: small files that can be searched
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure of ``width`` by ``height`` inches to draw on, in the project's style; without pyplot."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_SETTINGS):
        yield Canvas(figsize=(width, height), layout="constrained")


def finished(canvas: Any, name: str, caption: str) -> Figure:
    """The figure in both formats; call it inside of ``drawing``."""
    import matplotlib

    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # else names in the file are random
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return Figure(name, caption, svg.getvalue(), png.getvalue())
