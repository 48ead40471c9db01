"""Loss curves of a run as an SVG picture: python -m qvtune.report.curves RUN_DIR PICTURE.svg"""

import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from qvtune.report.metrics import read_metrics

Point = tuple[float, float]

_WIDTH, _HEIGHT = 640, 300  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 40, 45  # margins around the plot, pixels
_COLORS = {"training loss": "#1f77b4", "evaluation loss": "#d62728"}


def loss_curves(run_dir: Path) -> str:
    """An SVG with training and evaluation loss (nats per label token) over the optimizer steps of a run."""
    curves = {
        name: [(float(entry["step"]), entry["loss"]) for entry in read_metrics(run_dir, event)]
        for name, event in (("training loss", "step"), ("evaluation loss", "eval"))
    }
    points = [point for curve in curves.values() for point in curve]
    steps = _ticks(0.0, max(step for step, _ in points))
    losses = _ticks(min(loss for _, loss in points), max(loss for _, loss in points))

    def place(step: float, loss: float) -> Point:
        x = _LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (loss - losses[0]) / (losses[-1] - losses[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for loss in losses:
        (x, y), (right, _) = place(steps[0], loss), place(steps[-1], loss)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>')
        parts.append(_text(x - 8, y + 4, f"{loss:g}", "end"))
    for step in steps:
        x, y = place(step, losses[0])
        parts.append(_text(x, y + 18, f"{step:g}", "middle"))
    parts.append(_text((_WIDTH + _LEFT) / 2, _HEIGHT - 8, "optimizer step", "middle"))
    parts.append(_text(_LEFT, 20, "nats per label token", "start"))
    for number, (name, curve) in enumerate(curves.items()):
        color, placed = _COLORS[name], [place(*point) for point in curve]
        line = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        if name == "evaluation loss":  # few values, far apart
            parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>' for x, y in placed]
        parts.append(_text(_WIDTH - _RIGHT - 150 * (1 - number), 20, name, "end", color))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers, the first not above ``low`` and the last not below ``high``."""
    rough = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / distance), max(math.ceil(high / distance), math.floor(low / distance) + 1)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, color: str = "#333333") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(loss_curves(Path(sys.argv[1])), encoding="utf-8")
