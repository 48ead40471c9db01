"""Charts as small SVG pictures, drawn with nothing but numpy, so that every run can have a report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qvtune.report.drawing import COLORS
from qvtune.report.page import Figure

WIDTH, _PLOT_HEIGHT = 600, 230  # pixels, of the picture and of the plot in it
_LEFT, _RIGHT, _BOTTOM, _LEGEND_LINE = 62, 18, 42, 20  # around the plot
_CHARACTER = 7.0  # pixels, about
_MAX_POINTS = 300  # of a line; where a curve has more, a line of means and the range from least to largest
_LOG_RANGE = 30.0  # largest / smallest, from which on an axis is logarithmic where it may be
_MAX_MARKS = 60
_AXIS, _GRID, _SOFT, _FAULT = "#5b6675", "#e4e8ec", "#5b6675", "#a3301c"

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """``y`` over ``x``, equally many numbers; where ``y`` is not finite there is no point."""

    name: str
    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True)
class Span:
    """From ``start`` to ``end`` in a lane of ``lanes_chart``, with a note that is shown under the pointer."""

    start: float
    end: float
    note: str
    is_fault: bool = False


@dataclass(frozen=True)
class _Thin:
    """At most ``_MAX_POINTS`` points: means of neighbours, and the least and the largest of them."""

    x: _Numbers
    y: _Numbers
    low: _Numbers
    high: _Numbers
    is_thinned: bool


def line_chart(
    name: str, caption: str, curves: Sequence[Curve], x_label: str, y_label: str, *, may_be_log: bool = False
) -> Figure | None:
    """Lines on common axes; None where no curve has a point.

    ``may_be_log``: the y axis is logarithmic where all values are positive and the largest is 30 times the least.
    """
    thin = [(curve.name, _thinned(curve)) for curve in curves]
    thin = [(label, one) for label, one in thin if len(one.x)]
    if not thin:
        return None
    least, largest = min(float(one.low.min()) for _, one in thin), max(float(one.high.max()) for _, one in thin)
    is_log = may_be_log and least > 0 and largest / least >= _LOG_RANGE
    are_whole = all((one.x == np.rint(one.x)).all() for _, one in thin if not one.is_thinned)
    x_ends = min(float(one.x.min()) for _, one in thin), max(float(one.x.max()) for _, one in thin)
    x_ticks = ticks(*x_ends, least_distance=1.0 if are_whole else 0.0)
    y_ticks = _log_ticks(least, largest) if is_log else ticks(least, largest)
    legend, top = _legend([label for label, _ in thin])
    to_y = _scale([math.log(one) for one in y_ticks] if is_log else y_ticks, top + _PLOT_HEIGHT, top)
    to_x = _scale(x_ticks, _LEFT, WIDTH - _RIGHT)

    def place_y(values: _Numbers) -> _Numbers:
        return to_y(np.log(values) if is_log else values)

    parts = [*legend, _text(_LEFT, 14, y_label, "start", _SOFT)]
    for value, y in zip(y_ticks, place_y(np.array(y_ticks)), strict=True):
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, short_number(value), "end"))
    parts += _x_axis(x_ticks, to_x, top + _PLOT_HEIGHT, x_label)
    for number, (_, one) in enumerate(thin):
        color = COLORS[number % len(COLORS)]
        parts += _curve(one, to_x(one.x), place_y, color, is_dashed=number >= len(COLORS))
    return _figure(name, caption, top + _PLOT_HEIGHT + _BOTTOM, parts)


def bar_chart(name: str, caption: str, bars: Sequence[tuple[str, float, str]]) -> Figure | None:
    """A horizontal bar for each (label, value, text behind the bar); None where no value is positive."""
    largest = max((value for _, value, _ in bars), default=0.0)
    if largest <= 0:
        return None
    left = 16 + _CHARACTER * max(len(label) for label, _, _ in bars)
    right = 16 + _CHARACTER * max(len(text) for _, _, text in bars)
    parts = []
    for number, (label, value, text) in enumerate(bars):
        y, length = 8 + 24 * number, max(value, 0.0) / largest * (WIDTH - left - right)
        parts.append(_text(left - 8, y + 14, label, "end"))
        parts.append(f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="18" fill="{COLORS[0]}"/>')
        parts.append(_text(left + length + 6, y + 14, text, "start"))
    return _figure(name, caption, 12 + 24 * len(bars), parts)


def lanes_chart(
    name: str, caption: str, lanes: Sequence[tuple[str, Sequence[Span]]], x_label: str, width: int = 2 * WIDTH + 20
) -> Figure | None:
    """What happened when: one line of spans for each lane; None where there is no span."""
    spans = [span for _, lane in lanes for span in lane]
    if not spans:
        return None
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    left, right = 16 + _CHARACTER * max(len(label) for label, _ in lanes), width - 2.0 * _RIGHT
    to_x = _scale([first, max(last, first + 1e-9)], left, right)
    parts = []
    for number, (label, lane) in enumerate(lanes):
        y = 8 + 26 * number
        parts.append(_text(left - 8, y + 14, label, "end"))
        parts.append(f'<path d="M{left:.1f} {y + 9}H{right}" stroke="{_GRID}"/>')
        for span in lane[:: -(-len(lane) // _MAX_POINTS)] if lane else ():
            start, end = to_x(np.array([span.start, span.end]))
            color = _FAULT if span.is_fault else COLORS[number % len(COLORS)]
            box = f'x="{start:.1f}" y="{y}" width="{max(end - start, 3.0):.1f}" height="18"'
            parts.append(f'<rect {box} fill="{color}"><title>{escape(span.note)}</title></rect>')
    x_ticks = [one for one in ticks(first, last) if first <= one <= last]
    bottom = 8 + 26 * len(lanes)
    parts += _x_axis(x_ticks, to_x, bottom, x_label, (left, right))
    return _figure(name, caption, bottom + _BOTTOM, parts, width)


def ticks(low: float, high: float, least_distance: float = 0.0) -> list[float]:
    """About six round numbers, the first not above ``low`` and the last not below ``high``."""
    rough = max((high - low) / 5, abs(high) * 1e-6, 1e-12, least_distance)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance), max(math.ceil(high / distance), math.floor(low / distance) + 1)
    return [float(f"{number * distance:.12g}") for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """``1.5M``, ``20k``, ``0.25``, ``1e-05``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten where the range is small, else powers of ten; the outer two enclose it."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    below = max(number for number, one in enumerate(found) if one <= low)
    above = min(number for number, one in enumerate(found) if one >= high)
    return found[below : above + 1]


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[_Numbers], _Numbers]:
    """Pixels of a value; the first of ``values`` is at ``start``, the last at ``end``."""
    first, last = values[0], values[-1]
    return lambda value: start + (np.asarray(value) - first) / (last - first) * (end - start)


def _thinned(curve: Curve) -> _Thin:
    x, y = np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= _MAX_POINTS:
        return _Thin(x, y, y, y, is_thinned=False)
    borders = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(borders, len(x)))
    mean_x, mean_y = (np.add.reduceat(values, borders) / counts for values in (x, y))
    return _Thin(mean_x, mean_y, np.minimum.reduceat(y, borders), np.maximum.reduceat(y, borders), is_thinned=True)


def _curve(
    one: _Thin, x: _Numbers, place_y: Callable[[_Numbers], _Numbers], color: str, *, is_dashed: bool
) -> list[str]:
    parts, y = [], place_y(one.y)
    if one.is_thinned:
        outline = [*zip(x, place_y(one.high), strict=True), *list(zip(x, place_y(one.low), strict=True))[::-1]]
        parts.append(f'<path d="{_path(outline)}Z" fill="{color}" fill-opacity="0.2"/>')
    dashes = ' stroke-dasharray="6 3"' if is_dashed else ""
    line = _path(list(zip(x, y, strict=True)))
    parts.append(f'<path d="{line}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round"{dashes}/>')
    if len(x) <= _MAX_MARKS:
        for at_x, at_y, step, value in zip(x, y, one.x, one.y, strict=True):
            circle = f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.6" fill="{color}">'
            parts.append(f"{circle}<title>{short_number(step)}: {value:.6g}</title></circle>")
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _x_axis(
    values: Sequence[float],
    to_x: Callable[[_Numbers], _Numbers],
    bottom: float,
    label: str,
    ends: tuple[float, float] = (_LEFT, WIDTH - _RIGHT),
) -> list[str]:
    parts = [f'<path d="M{ends[0]:.1f} {bottom}H{ends[1]}" stroke="{_AXIS}"/>']
    for value, x in zip(values, to_x(np.array(values)), strict=True):
        parts.append(_text(x, bottom + 17, short_number(value), "middle"))
    return [*parts, _text(sum(ends) / 2, bottom + 35, label, "middle", _SOFT)]


def _legend(labels: Sequence[str]) -> tuple[list[str], float]:
    """Names of the curves in their colours, in as many lines as they need, and where the plot begins below."""
    parts, x, y = [], float(_LEFT), 36
    for number, label in enumerate(labels):
        width = 26 + _CHARACTER * len(label)
        if x > _LEFT and x + width > WIDTH:
            x, y = float(_LEFT), y + _LEGEND_LINE
        color = COLORS[number % len(COLORS)]
        dashes = ' stroke-dasharray="6 3"' if number >= len(COLORS) else ""
        parts.append(f'<path d="M{x:.1f} {y - 4}h16" stroke="{color}" stroke-width="3"{dashes}/>')
        parts.append(_text(x + 21, y, label, "start"))
        x += width
    return parts, y + 12.0


def _text(x: float, y: float, text: str, anchor: str, color: str = "#1d2530") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _figure(name: str, caption: str, height: float, parts: Sequence[str], width: int = WIDTH) -> Figure:
    size = f'width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return Figure(name, caption, "\n".join([opening, *parts, "</svg>"]) + "\n")
