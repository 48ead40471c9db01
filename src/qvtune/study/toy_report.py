"""Results of the toy model of Theorem 2: a table of all exponents, a picture, and a few lines of text."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from qvtune.console import console
from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_file
from qvtune.study.extra import require_extra
from qvtune.study.toy import EXPONENTS_A, EXPONENTS_B, OPTIMIZERS, STEPS, THEOREM, WIDTHS, Exponent, exponents, worst

NOTE = (
    "A reconstruction: the paper's toy model could not be read; this one is LoRA+'s (arXiv 2402.12354), "
    "which has the same three deltas."
)
_NAMES = {"sgd": "gradient descent (as in the theorem)", "adam": "Adam"}


def toy(output: Path, seeds: int) -> None:
    """Simulate, and write ``toy.csv`` and ``toy.svg`` into ``output``; print what they show.

    Raises UserError for a file in the place of ``output`` and for fewer than 20 seeds, whose intervals mean nothing.
    """
    require_extra("matplotlib")
    problems = [f"--output: {output} is a file; give a folder"] if output.exists() and not output.is_dir() else []
    problems += [f"--seeds: {seeds}; at least 20 are needed for an interval"] if seeds < 20 else []
    if problems:
        raise UserError(problems)
    found = [one for optimizer in OPTIMIZERS for one in exponents(optimizer, seeds)]
    output.mkdir(parents=True, exist_ok=True)
    _write_csv(found, output / "toy.csv")
    _draw(found, output / "toy.svg")
    for line in summary(found, seeds):
        console().print(line, markup=False, soft_wrap=True)
    console().print(f"{output / 'toy.csv'} and {output / 'toy.svg'}", markup=False, soft_wrap=True)


def summary(found: Sequence[Exponent], seeds: int) -> list[str]:
    """What holds at the theorem's rates and what elsewhere, for each optimizer."""
    lines = [
        NOTE,
        f"Widths {WIDTHS[0]} to {WIDTHS[-1]}, {seeds} seeds, steps 2 to {STEPS}. Of each delta the step whose "
        "exponent is the farthest from 0 is shown, with its 95 % interval.",
    ]
    for optimizer in OPTIMIZERS:
        of_pair = _by_pair(found, optimizer)
        lines.append(f"{_NAMES[optimizer]}, eta_QK = Theta(1/n), eta_V = Theta(1):")
        for delta in (1, 2, 3):
            one = worst([one for one in of_pair[THEOREM] if one.delta == delta])
            within = "Theta(1)" if one.is_constant else "not shown to be Theta(1)"
            lines.append(
                f"  delta_{delta} ~ n^{one.slope:+.3f} [{one.low:+.3f}, {one.high:+.3f}] in step {one.step}: {within}"
            )
        elsewhere = [ones for pair, ones in of_pair.items() if pair != THEOREM]
        excluded = sum(any(one.is_not_constant for one in ones) for ones in elsewhere)
        least = min(abs(worst(ones).slope) for ones in elsewhere)
        lines.append(
            f"  at {excluded} of {len(elsewhere)} other pairs of exponents a delta grows or vanishes, "
            f"everywhere one at least as fast as n^{least:.2f} or n^-{least:.2f}"
        )
    return lines


def _by_pair(found: Sequence[Exponent], optimizer: str) -> dict[tuple[float, float], list[Exponent]]:
    grouped: dict[tuple[float, float], list[Exponent]] = {}
    for one in found:
        if one.optimizer == optimizer:
            grouped.setdefault((one.exponent_a, one.exponent_b), []).append(one)
    return grouped


def _write_csv(found: Sequence[Exponent], path: Path) -> None:
    with atomic_file(path) as private, private.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(found[0])))
        writer.writeheader()
        for one in found:
            writer.writerow({key: _rounded(value) for key, value in asdict(one).items()})


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def _draw(found: Sequence[Exponent], path: Path) -> None:
    """Heat maps of the exponents, one row per optimizer, one column per delta; a frame around the theorem's rates."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(len(OPTIMIZERS), 3, squeeze=False)
    extent = (EXPONENTS_B[0] - 0.125, EXPONENTS_B[-1] + 0.125, EXPONENTS_A[0] - 0.125, EXPONENTS_A[-1] + 0.125)
    for row, optimizer in enumerate(OPTIMIZERS):
        of_pair = _by_pair(found, optimizer)
        for delta, plot in zip((1, 2, 3), axes[row], strict=True):
            slopes = np.array(
                [
                    [worst([one for one in of_pair[a, b] if one.delta == delta]).slope for b in EXPONENTS_B]
                    for a in EXPONENTS_A
                ]
            )
            image = plot.imshow(slopes, origin="lower", extent=extent, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
            plot.plot(THEOREM[1], THEOREM[0], "s", markersize=18, markerfacecolor="none", markeredgecolor="black")
            plot.set_title(f"delta_{delta}, {_NAMES[optimizer]}", fontsize=10)
            plot.set_xlabel("exponent of eta_V")
            plot.set_ylabel("exponent of eta_QK")
    figure.colorbar(
        image, ax=axes, label="exponent of |delta| in the width n (steps 2 to 10: the farthest from 0)", extend="both"
    )
    title = "Theorem 2 of arXiv 2410.02247, all delta are Theta(1) in the frame: eta_QK = Theta(1/n), eta_V = Theta(1)"
    figure.suptitle(f"{title}\n{NOTE}", fontsize=9)
    # Text as text, and the same bytes every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "toy"}), atomic_file(path) as private:
        figure.savefig(private, format="svg", metadata={"Date": None})
