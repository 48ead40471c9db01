"""Products with a frozen matrix by oneDNN and by torch's own function, in float32 on this CPU:
python -m tests.benchmarks.linear [--tokens 512] [--repeats 20]

The shapes are those of the demo model's layers and of an 8B model's. Both take turns, on OMP_NUM_THREADS threads.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qvtune.model.linear import linear

# What it is -> rows and columns of the matrix
SHAPES = {
    "demo, q": (576, 576),
    "demo, k": (192, 576),
    "demo, gate": (1536, 576),
    "demo, down": (576, 1536),
    "8B, q": (4096, 4096),
    "8B, k": (1024, 4096),
}


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    shown = Table(title=f"GFLOP/s, {arguments.tokens} tokens, {torch.get_num_threads()} threads")
    for heading in ("", "", "oneDNN", "torch", "ratio"):
        shown.add_column(heading, justify="right")
    for name, (rows, columns) in SHAPES.items():
        inputs, gradient = torch.randn(arguments.tokens, columns), torch.randn(arguments.tokens, rows)
        weight = torch.randn(rows, columns)
        products: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "forward": (lambda x=inputs, w=weight: linear(x, w), lambda x=inputs, w=weight: nn.functional.linear(x, w)),
            "backward": (lambda g=gradient, w=weight: linear(g, w.T), lambda g=gradient, w=weight: g @ w),
        }
        for direction, both in products.items():
            ours, torchs = (2e-9 * arguments.tokens * rows * columns / one for one in seconds(both, arguments.repeats))
            shown.add_row(name, direction, f"{ours:.0f}", f"{torchs:.0f}", f"{ours / torchs:.2f}")
    Console().print(shown)


def seconds(both: tuple[Callable[[], object], Callable[[], object]], repeats: int) -> list[float]:
    """Median of each, which take turns."""
    found: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for times, compute in zip(found, both, strict=True):
            started = time.perf_counter()
            compute()
            if repeat:  # the first call prepares
                times.append(time.perf_counter() - started)
    return [median(times) for times in found]


if __name__ == "__main__":
    main()
