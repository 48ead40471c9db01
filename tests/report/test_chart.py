"""Charts, read as pictures: where the points are, and that nothing is outside."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from qvtune.report.chart import Curve, Span, bar_chart, lanes_chart, line_chart, short_number, ticks
from qvtune.report.page import Figure

SVG = "{http://www.w3.org/2000/svg}"


def drawn(figure: Figure | None) -> ElementTree.Element:
    assert figure is not None
    return ElementTree.fromstring(figure.svg)


def lines(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Points of each curve, without axes and areas."""
    found = [path for path in root.iter(f"{SVG}path") if path.get("stroke-linejoin")]
    return [[(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.attrib["d"])] for path in found]


def texts(root: ElementTree.Element) -> set[str]:
    return {text.text or "" for text in root.iter(f"{SVG}text")}


def test_curves_have_common_axes() -> None:
    curves = [Curve("training", [1, 2, 4], [3.0, 2.0, 1.0]), Curve("a < b", [0, 4], [3.0, 2.0])]
    root = drawn(line_chart("loss", "caption", curves, "optimizer step", "nats"))
    ((x1, y3), (x2, y2), (x4, y1)), evaluation = lines(root)
    assert y3 < y2 < y1, "down is less"
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2) and y2 - y3 == pytest.approx(y1 - y2, abs=0.2)
    assert [y for _, y in evaluation] == [y3, y2] and evaluation[1][0] == x4
    assert {"training", "a < b", "optimizer step", "nats", "0", "4", "1", "3"} <= texts(root)
    assert "2: 2" in {title.text for title in root.iter(f"{SVG}title")}


def test_a_curve_with_many_points_is_a_line_of_means_and_an_area() -> None:
    values = np.zeros(1_000_000)
    values[654_321] = 50.0  # is seen although it is one of a million
    figure = line_chart("many", "caption", [Curve("one", np.arange(1_000_000), values)], "step", "value")
    root = drawn(figure)
    assert figure is not None and len(figure.svg) < 20_000
    (line,) = lines(root)
    assert 100 < len(line) <= 300
    (area,) = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.get("fill-opacity")]
    points = [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", area)]
    highest = min(points, key=lambda point: point[1])
    (left, top), (right, bottom) = min(points), max(points)
    assert (highest[0] - left) / (right - left) == pytest.approx(0.654, abs=0.01)
    assert bottom - highest[1] > 200 and top > 0, "the area reaches the top of the plot"


def heights(values: list[float]) -> list[float]:
    """Pixels from each point to the next, upwards, on an axis that may be logarithmic."""
    curve = Curve("norm", range(len(values)), values)
    (line,) = lines(drawn(line_chart("norm", "caption", [curve], "step", "norm", may_be_log=True)))
    return [first[1] - second[1] for first, second in pairwise(line)]


def test_a_large_range_of_positive_values_is_logarithmic() -> None:
    first, *others = heights([0.01, 0.1, 1.0, 10.0])
    assert others == pytest.approx([first, first], abs=0.2) and first > 50
    linear = heights([0.0, 0.1, 1.0, 10.0])
    assert linear[2] == pytest.approx(10 * linear[1], rel=0.05), "there is a zero"
    assert heights([1.0, 2.0, 4.0])[1] == pytest.approx(2 * heights([1.0, 2.0, 4.0])[0], abs=0.2), "the range is small"


def test_everything_is_inside_the_picture() -> None:
    curves = [
        Curve(f"a run with a long name {n}", range(1, 38), [2.4 - n - s * 0.013 for s in range(37)]) for n in range(12)
    ]
    root = drawn(line_chart("wide", "caption", curves, "step", "loss"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    found = lines(root)
    assert len(found) == 12
    assert all(0 < x < width and 0 < y < height for line in found for x, y in line)
    assert all(
        0 < float(text.attrib["x"]) < width and 0 < float(text.attrib["y"]) < height for text in root.iter(f"{SVG}text")
    )


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_without_a_point_there_is_no_chart(values: list[float]) -> None:
    assert line_chart("none", "caption", [Curve("empty", range(len(values)), values)], "step", "loss") is None
    assert bar_chart("none", "caption", [("a", 0.0, "0")]) is None
    assert lanes_chart("none", "caption", [("lane", [])], "minutes") is None


def test_one_value_can_be_drawn() -> None:
    (line,) = lines(drawn(line_chart("one", "caption", [Curve("c", [5], [0.0])], "step", "loss")))
    assert len(line) == 1


def test_bars_are_as_long_as_their_values() -> None:
    root = drawn(bar_chart("time", "caption", [("training", 30.0, "30 s"), ("evaluation", 10.0, "10 s")]))
    first, second = (float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect"))
    assert first == pytest.approx(3 * second, abs=0.2)
    assert {"training", "evaluation", "30 s", "10 s"} <= texts(root)


def test_lanes_show_when_and_how_long() -> None:
    lanes = [("training", [Span(0, 6, "start 1"), Span(8, 10, "start 2")]), ("faults", [Span(6, 6, "<killed>", True)])]
    root = drawn(lanes_chart("starts", "caption", lanes, "minutes"))
    first, second, fault = root.iter(f"{SVG}rect")
    left, width = float(first.attrib["x"]), float(first.attrib["width"])
    assert float(second.attrib["width"]) == pytest.approx(width / 3, abs=0.2)
    assert float(fault.attrib["x"]) == pytest.approx(left + width, abs=0.2) and float(fault.attrib["width"]) == 3
    assert fault.attrib["fill"] != first.attrib["fill"]
    assert [title.text for title in root.iter(f"{SVG}title")] == ["start 1", "start 2", "<killed>"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 20, [0, 5, 10, 15, 20]), (1.37, 2.69, [1, 1.5, 2, 2.5, 3]), (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1])],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_ticks_of_whole_numbers_are_whole() -> None:
    assert ticks(0, 2, least_distance=1.0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"), [(1_500_000, "1.5M"), (20_000, "20k"), (2000, "2000"), (0.25, "0.25"), (0.0, "0"), (3e9, "3G")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
