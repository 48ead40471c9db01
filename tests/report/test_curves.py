"""The picture of a run's losses."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from qvtune.report.curves import loss_curves
from qvtune.report.metrics import MetricsLog

SVG = "{http://www.w3.org/2000/svg}"


def picture(run_dir: Path, losses: dict[int, float], evaluations: dict[int, float]) -> ElementTree.Element:
    log = MetricsLog(run_dir, first_step=1)
    for step, loss in losses.items():
        log.write("step", step=step, loss=loss)
    for step, loss in evaluations.items():
        log.write("eval", step=step, loss=loss)
    log.close()
    return ElementTree.fromstring(loss_curves(run_dir))


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_both_curves_are_on_one_scale(tmp_path: Path) -> None:
    root = picture(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0}, {0: 3.0, 4: 2.0})
    training, evaluation = (points(line) for line in root.iter(f"{SVG}polyline"))
    (x1, y3), (x2, y2), (x4, y1) = training
    assert y3 < y2 < y1, "down is less"
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2) and y2 - y3 == pytest.approx(y1 - y2, abs=0.2)
    assert [y for _, y in evaluation] == [y3, y2] and evaluation[1][0] == x4
    shown = {text.text for text in root.iter(f"{SVG}text")}
    assert {"training loss", "evaluation loss", "optimizer step", "nats per label token", "0", "4", "1", "3"} <= shown


def test_everything_is_inside_the_picture(tmp_path: Path) -> None:
    root = picture(tmp_path, {step: 2.4093 - step * 0.013 for step in range(1, 38)}, {0: 2.6867})
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in root.iter(f"{SVG}polyline"):
        assert all(0 < x < width and 0 < y < height for x, y in points(line))
    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_a_run_with_one_value_can_be_drawn(tmp_path: Path) -> None:
    (line, _) = picture(tmp_path, {1: 2.0}, {}).iter(f"{SVG}polyline")
    assert len(points(line)) == 1
