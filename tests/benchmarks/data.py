"""Tokenizing and packing, side by side with TRL, and how both memory and starts grow: python -m tests.benchmarks.data

`--rows FILE` takes GSM8K's train.jsonl (question and answer in each line); without it rows of about that size are made
up. Each way runs in a process of its own with the demo model's tokenizer, on the same file of prompt and completion,
packed to 2,048 tokens, `--repeats` times in turn; the fastest of each is shown. Seconds begin after all imports. TRL's
are those of its SFTTrainer around a model of one tiny layer, once as it is by default (one process) and once with a
process for each core, as ours.

`--growth 10000 100000 1000000` (none to leave it out) makes files of so many rows; ours tokenizes each, starts again,
and finds the rows at nine tenths of an epoch.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from tests.support.processes import run_command

FORMS = ("text", "chat")
WAYS = {  # name -> what data_once is told, and the number of processes; 0: as many as there are cores
    "TRL": ("trl", 1),
    "TRL, a process a core": ("trl", 0),
    "ours": ("ours", 0),
    "ours, packing: dense": ("dense", 0),
}
NUM_MADE_UP = 7473
Costs = dict[str, float]


def main() -> None:
    """Make the files, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--growth", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qvtune-benchmark")
    arguments = parser.parse_args()
    folder, console = arguments.folder / "data", Console(width=140)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = model_folder("demo", cache_dir())
    results: dict[tuple[str, str], list[Costs]] = {}
    for form in FORMS:
        file = write_rows(folder / f"{form}.jsonl", form, questions(arguments.rows))
        for _ in range(arguments.repeats):
            for name, (way, num_processes) in WAYS.items():
                costs = measure(way, tokenizer, file, folder, num_processes)
                results.setdefault((form, name), []).append(costs)
                console.print(f"{form}, {name}: {costs}")
    if results:
        console.print(side_by_side({key: min(found, key=lambda one: one["seconds"]) for key, found in results.items()}))
    grown: dict[int, Costs] = {}
    for num_rows in arguments.growth:
        file = write_rows(folder / f"{num_rows}.jsonl", "text", made_up(num_rows))
        first = measure("ours", tokenizer, file, folder, 0)
        grown[num_rows] = first | measure("again", tokenizer, file, folder, 0)
        file.unlink()
        console.print(f"{num_rows} rows: {grown[num_rows]}")
    if grown:
        console.print(growth(grown))


def questions(rows: Path | None) -> Iterator[tuple[str, str]]:
    """Questions and answers of a file, or made up."""
    if rows is None:
        yield from made_up(NUM_MADE_UP)
        return
    for line in rows.open(encoding="utf-8"):
        row = json.loads(line)
        yield row["question"], row["answer"]


def made_up(num_rows: int) -> Iterator[tuple[str, str]]:
    """Words of a small vocabulary."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    for _ in range(num_rows):
        question, answer = (" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(2))
        yield question, answer


def write_rows(file: Path, form: str, rows: Iterator[tuple[str, str]]) -> Path:
    """One object a line: prompt and completion, as text or as a conversation's messages."""
    with file.open("w", encoding="utf-8") as opened:
        for question, answer in rows:
            row: dict[str, Any] = {"prompt": question, "completion": answer}
            if form == "chat":
                row = {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": answer}],
                }
            opened.write(json.dumps(row) + "\n")
    return file


def measure(way: str, tokenizer: Path, file: Path, folder: Path, num_processes: int) -> Costs:
    """What one process notes of itself; ``again`` finds what ``ours`` has left."""
    if way != "again":
        shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "work").mkdir(exist_ok=True)
    result = folder / "costs.json"
    num_cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "tests.benchmarks.data_once", way, tokenizer, file, folder / "work", result]
    environment = {"QVTUNE_CACHE": str(folder / "work")}
    ended = run_command([*command, str(num_processes or num_cores)], folder, timeout=7200, **environment)
    if ended.code != 0:
        raise SystemExit(ended.output)
    costs: Costs = json.loads(result.read_text())
    return costs


def side_by_side(results: dict[tuple[str, str], Costs]) -> Table:
    """A line for each measurement, with its speed as a multiple of TRL's default."""
    shown = Table(title=f"tokenizing and packing to 2,048 tokens on {len(os.sched_getaffinity(0))} cores")
    for heading in ("rows are", "way", "rows/s", "of TRL", "tokens/s", "CPU s", "density", "peak MiB", "of a fork"):
        shown.add_column(heading, justify="left" if heading in ("rows are", "way") else "right")
    for (form, name), costs in results.items():
        seconds, trl = costs["seconds"], results[form, "TRL"]["seconds"]
        cells = [
            *(f"{costs['rows'] / seconds:,.0f}", f"{trl / seconds:.2f}", f"{costs['tokens'] / seconds:,.0f}"),
            *(f"{costs['cpu_seconds']:.1f}", f"{costs['density']:.2%}"),
            *(f"{costs[one] / 2**20:,.0f}" for one in ("peak_bytes", "fork_bytes")),
        ]
        shown.add_row(form, name, *cells)
    return shown


def growth(results: dict[int, Costs]) -> Table:
    """A line for each number of rows."""
    shown = Table(title="ours: growth with the rows")
    for heading in (
        "rows",
        "seconds",
        "rows/s",
        "peak MiB",
        "of a fork",
        "again: seconds",
        "peak MiB",
        "a step at 90 %: s",
    ):
        shown.add_column(heading, justify="right")
    for num_rows, costs in results.items():
        sizes = [f"{costs[one] / 2**20:,.0f}" for one in ("peak_bytes", "fork_bytes", "again_peak_bytes")]
        shown.add_row(
            *(f"{num_rows:,}", f"{costs['seconds']:,.1f}", f"{num_rows / costs['seconds']:,.0f}", *sizes[:2]),
            *(f"{costs['again_seconds']:.2f}", sizes[2], f"{costs['step_seconds']:.2f}"),
        )
    return shown


if __name__ == "__main__":
    main()
