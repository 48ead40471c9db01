"""Loading a 4-bit base for ZeRO-3, side by side with transformers: python -m tests.benchmarks.load [--ranks 1 2 4]

A LLaMA-shaped model of 1.1B weights in five bfloat16 files is made once (2.2 GB). The files lie in the page cache for
all alike, so the seconds are those of computing and copying, not of a disk. Every figure is the largest of the ranks.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from qvtune.model.quantize import quantize
from tests.model.sparse import SMOLLM2_135M, llama_shapes, num_weights
from tests.support.processes import run_ranks

CONFIG = {
    **SMOLLM2_135M,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
NUM_FILES = 5
Costs = dict[str, float]


def main() -> None:
    """Make the model, measure each way at each number of ranks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qvtune-benchmark")
    arguments = parser.parse_args()
    source = arguments.folder / "llama-1.1b"
    nf4 = arguments.folder / "llama-1.1b-nf4"
    if not source.exists():
        make_model(source)
    if not nf4.exists():
        quantize(source, nf4)
    ways = {
        "ours, from bf16": ("zero3", source),
        "ours, from NF4": ("zero3", nf4),
        "transformers": ("transformers", source),
    }
    console = Console(width=120)
    results = {}
    for num_ranks in arguments.ranks:
        for name, (kind, folder) in ways.items():
            costs = measure(kind, folder, num_ranks, arguments.folder / "results")
            console.print(f"{num_ranks} ranks, {name}: {costs}")
            results[name, num_ranks] = costs
    console.print(table(results))


def make_model(folder: Path) -> None:
    """Weights from one pool of normal numbers, since drawing a billion of them takes longer than all else."""
    pool = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(NUM_FILES)]
    total, before = num_weights(CONFIG), 0
    for name, shape in llama_shapes(CONFIG).items():
        files[before * NUM_FILES // total][name] = shape
        before += math.prod(shape)
    weight_map = {}
    for number, shapes in enumerate(files, start=1):
        file = partial / f"model-{number:05d}-of-{NUM_FILES:05d}.safetensors"
        tensors = {
            name: pool.repeat(math.ceil(math.prod(shape) / len(pool)))[: math.prod(shape)].view(shape).clone()
            for name, shape in shapes.items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file.name)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(CONFIG))
    partial.rename(folder)


def measure(kind: str, folder: Path, num_ranks: int, results: Path) -> Costs:
    """The largest of each cost over the ranks."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    ended = run_ranks(
        [sys.executable, "-m", "tests.benchmarks.load_rank", kind, folder, results],
        num_ranks,
        results / "output",
        timeout=900,
        OMP_NUM_THREADS=str(threads),
    )
    for one in ended:
        if one.code != 0:
            raise SystemExit(one.output)
    ranks = [json.loads(file.read_text()) for file in sorted(results.glob("rank-*.json"))]
    assert len(ranks) == num_ranks
    return {cost: max(rank[cost] for rank in ranks) for cost in ranks[0]}


def table(results: dict[tuple[str, int], Costs]) -> Table:
    """One line for each measurement; MiB. ``of share``: frozen bytes against the smallest total / ranks."""
    shown = Table(title=f"{num_weights(CONFIG):,} weights; MiB, the largest of the ranks")
    for heading in ("ranks", "way", "seconds", "peak RSS", "above idle", "read", "frozen", "of share"):
        shown.add_column(heading, justify="left" if heading == "way" else "right")
    total = min(costs["base_bytes"] * num_ranks for (_, num_ranks), costs in results.items())
    for (name, num_ranks), costs in results.items():
        mebibytes = [costs[cost] / 2**20 for cost in ("peak_bytes", "added_bytes", "bytes_read", "base_bytes")]
        share = costs["base_bytes"] / (total / num_ranks)
        row = [f"{costs['seconds']:.1f}", *(f"{size:,.0f}" for size in mebibytes), f"{share:.3f}"]
        shown.add_row(str(num_ranks), name, *row)
    return shown


if __name__ == "__main__":
    main()
