"""The toy model of Theorem 2: its trajectories against torch's optimizers on whole vectors, and its exponents."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from qvtune.errors import UserError
from qvtune.study.extra import require_extra
from qvtune.study.toy import STEPS, THEOREM, Optimizer, draw, exponents, simulate, worst
from qvtune.study.toy_report import toy

WIDTHS = (16, 64, 256, 1024)


def deltas_of_torch(optimizer: Optimizer, x: torch.Tensor, a: torch.Tensor, rates: tuple[float, float]) -> np.ndarray:
    """[steps, 3], by training all of a and b."""
    a, b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    groups = [{"params": [a], "lr": rates[0]}, {"params": [b], "lr": rates[1]}]
    # eps = 0 as in the simulation; torch would divide 0 by 0 in the first step, in which b = 0
    trained = torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.Adam(groups, eps=1e-30)
    found = []
    for _ in range(STEPS):
        before_c, before_b = (a @ x).item(), b.item()
        trained.zero_grad()
        ((b * (a @ x) - 1) ** 2 / 2).backward()
        trained.step()
        change_c, change_b = (a @ x).item() - before_c, b.item() - before_b
        found.append((-before_b * change_c, -before_c * change_b, change_b * change_c))
    return np.array(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_three_numbers_are_enough(optimizer: Optimizer) -> None:
    """The trajectory of vectors of 50 numbers, two seeds and two pairs of rates, by torch."""
    width, draws = 50, draw([50], seeds=2)
    rates_a, rates_b = np.array([0.1 / width, 0.5 / width]), np.array([0.2])
    shaped = rates_a[:, None, None, None], rates_b[:, None, None]
    found = np.array(list(simulate(optimizer, draws, *shaped)))  # [steps, 3, A, B, widths, seeds]
    random = np.random.default_rng(0)
    for seed in range(2):
        x, a = (torch.from_numpy(values) for values in random.standard_normal((2, width)))
        for row, rate in enumerate(rates_a):
            expected = deltas_of_torch(optimizer, x, a / np.sqrt(width), (rate, rates_b[0]))
            np.testing.assert_allclose(found[:, :, row, 0, 0, seed], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_all_deltas_are_constant_at_the_rates_of_the_theorem_and_not_beside_them(optimizer: Optimizer) -> None:
    found = exponents(optimizer, 2000, WIDTHS, (-1.25, -1.0, -0.75), (-0.25, 0.0, 0.25))
    assert len(found) == 9 * 3 * (STEPS - 1)
    for pair in {(one.exponent_a, one.exponent_b) for one in found}:
        of_pair = [one for one in found if (one.exponent_a, one.exponent_b) == pair]
        if pair == THEOREM:
            assert all(one.is_constant for one in of_pair), worst(of_pair)
        else:
            assert any(one.is_not_constant for one in of_pair) and abs(worst(of_pair).slope) > 0.2, worst(of_pair)


def test_the_exponents_are_those_of_the_formulas_in_the_second_step() -> None:
    """With eta_a = n^(-1 + p) and eta_b = n^-q: b = n^-q, so the deltas are n^(p - 2q), n^-q and n^(p - 2q)."""
    (p, q) = 0.25, 0.5
    found = {one.delta: one for one in exponents("sgd", 2000, WIDTHS, [p - 1], [-q]) if one.step == 2}
    for delta, expected in {1: p - 2 * q, 2: -q, 3: p - 2 * q}.items():
        assert found[delta].low - 0.05 < expected < found[delta].high + 0.05, found[delta]


def test_runs_that_diverge_have_an_exponent() -> None:
    found = exponents("sgd", 50, WIDTHS, [0.0], [1.0])
    assert all(np.isfinite([one.slope, one.low, one.high]).all() for one in found)
    assert any(one.is_not_constant for one in found)


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(tmp_path / "out", seeds=20)
    shown = capsys.readouterr().out
    assert "A reconstruction: the paper's toy model could not be read" in shown
    assert shown.count("other pairs of exponents") == 2 and "gradient descent (as in the theorem)" in shown
    with (tmp_path / "out" / "toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 81 * 3 * (STEPS - 1)
    assert all(float(row["low"]) <= float(row["slope"]) <= float(row["high"]) for row in rows)
    picture = (tmp_path / "out" / "toy.svg").read_bytes()
    assert picture.count(b"<svg") == 1 and b"A reconstruction" in picture
    toy(tmp_path / "out", seeds=20)
    assert (tmp_path / "out" / "toy.svg").read_bytes() == picture, "the same input gives the same bytes"


def test_what_cannot_be_done_is_said_at_once(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(UserError) as caught:
        toy(taken, seeds=5)
    assert caught.value.problems == (
        f"--output: {taken} is a file; give a folder",
        "--seeds: 5; at least 20 are needed for an interval",
    )


def test_a_missing_package_is_named() -> None:
    require_extra("numpy")
    with pytest.raises(UserError, match="needs not_there and nor_this, not installed here: run `make env`"):
        require_extra("not_there", "numpy", "nor_this")
