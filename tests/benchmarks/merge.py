"""Merging into a bf16 model, side by side with PEFT: python -m tests.benchmarks.merge [--ways peft original ...]

A LLaMA-shaped model of 1.1B weights in five files is made once (2.2 GB), and a q+v adapter of rank 16. Each way runs in
a process of its own, on all cores, `--repeats` times in turn; the fastest of each is shown. Ours writes to the disk
before it says that it is done (fsync) and checks the base's fingerprint, PEFT's way does neither.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from qvtune.checkpoint import folder, state
from qvtune.config.schema import ModelSection
from qvtune.convert.merge.base import open_merge_base
from qvtune.model.fingerprint import ContentChecksums
from tests.benchmarks.load import CONFIG, make_model
from tests.model.sparse import llama_shapes
from tests.support.processes import run_command
from tests.support.tiny import make_tokenizer

WAYS = ("peft", "original", "dequantized", "original+proof", "dequantized+proof")
RANK = 16
Costs = dict[str, float]


def main() -> None:
    """Make model and adapter, measure each way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qvtune-benchmark")
    arguments = parser.parse_args()
    base, run = arguments.folder / "llama-1.1b", arguments.folder / "run-1.1b"
    if not base.exists():
        make_model(base)
    make_tokenizer().save_pretrained(base)  # the folder may be that of tests/benchmarks/load.py, which needs none
    if not (run / "checkpoints" / "latest").exists():
        make_run(run, base, CONFIG)
    results: dict[str, list[Costs]] = {way: [] for way in arguments.ways}
    console = Console(width=120)
    for _ in range(arguments.repeats):
        for way, costs in results.items():
            costs.append(measure(way, run, arguments.folder / "merged", arguments.folder / "results"))
            console.print(f"{way}: {costs[-1]}")
    console.print(
        table({way: {cost: min(one[cost] for one in found) for cost in found[0]} for way, found in results.items()})
    )


def make_run(run: Path, base: Path, config: dict[str, Any], quantization: Literal["nf4", "none"] = "nf4") -> Path:
    """A run folder with one checkpoint: random factors for the q and v projections of ``base``."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, (num_out, *rest) in llama_shapes(config).items():
        if "q_proj" in name or "v_proj" in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, shape in (("A", (RANK, *rest)), ("B", (num_out, RANK))):
                values = (0.01 * torch.randn(shape, generator=generator)).bfloat16()
                factors[f"{prefix}.lora_{factor}.default.weight"] = {
                    key: values.clone() for key in ("value", "master", "exp_avg", "exp_avg_sq")
                }
    peft_config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    section = ModelSection(name_or_path=str(base), quantization=quantization)
    trainer = state.TrainerState(step=1, trajectory={"model": section.model_dump()})
    opened = open_merge_base(base, ModelSection(quantization="none"), torch.bfloat16)
    checksums = ContentChecksums(opened.weights)
    for name in opened.tensors:
        checksums.add(name, opened.weights.read(name))
    content = opened.fingerprint(checksums)
    folder.write(run / "checkpoints", 1, lambda path: state.save(path, factors, peft_config, trainer, content))
    return run


def measure(way: str, run: Path, output: Path, results: Path) -> Costs:
    """Seconds of the process and of the part behind its imports, CPU seconds, peak resident bytes."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    os.sync()  # what the one before has left to be written is not this one's
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "tests.benchmarks.merge_once", way, run, output, results / "costs.json"]
    threads = str(len(os.sched_getaffinity(0)))
    ended = run_command(command, results, timeout=1800, OMP_NUM_THREADS=threads)
    process_seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.code != 0:
        raise SystemExit(ended.output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"process_seconds": process_seconds, "cpu_seconds": cpu, **json.loads((results / "costs.json").read_text())}


def table(results: dict[str, Costs]) -> Table:
    """A line for each way, with its share of PEFT's where that was measured."""
    shown = Table(title="merging a q+v adapter of rank 16 into 1.1B weights, bf16")
    for heading in ("way", "process s", "of PEFT", "after imports s", "of PEFT", "CPU s", "peak MiB", "of PEFT"):
        shown.add_column(heading, justify="left" if heading == "way" else "right")
    peft = results.get("peft")
    for way, costs in results.items():
        cells = []
        for cost, unit in (("process_seconds", 1), ("seconds", 1), ("cpu_seconds", 1), ("peak_bytes", 2**20)):
            cells.append(f"{costs[cost] / unit:,.{1 if unit == 1 else 0}f}")
            if cost != "cpu_seconds":
                cells.append(f"{costs[cost] / peft[cost]:.2f}" if peft else "")
        shown.add_row(way, *cells)
    return shown


if __name__ == "__main__":
    main()
