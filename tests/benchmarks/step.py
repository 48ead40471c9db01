"""A training step beside TRL's SFTTrainer: python -m tests.benchmarks.step --rows GSM8K.jsonl [--ranks 2] [--steps 8]

Both train the same NF4 base with the same adapters on the same packed rows in the same order under ZeRO-3, on the demo
model, whose embedding is also its head, and on a copy whose head is a matrix of its own. The two runs are started
together and take turns, one step each, so that whatever else the machine does slows both alike. The first steps, in
which DeepSpeed records the order of the modules, are not counted. What one GPU does: tests/benchmarks/step_gpu.py.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from qvtune.config.schema import RunConfig
from qvtune.data.batch import padding_token
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from qvtune.train.data import TRAIN, load_data, row_order
from tests.support.processes import Finished, run_ranks

WAYS = ("ours", "trl")
WARM_UP = 3  # steps
Settings = dict[str, Any]


def main() -> None:
    """Measure both models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="prompts and completions, or questions and answers")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="that are counted")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a packed row; a rank has one row a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in both")
    parser.add_argument("--models", nargs="+", default=["tied", "untied"], choices=["tied", "untied"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qvtune-benchmark-step")
    arguments = parser.parse_args()
    console = Console(width=140)
    for name in arguments.models:
        settings = prepare(arguments, make_model(arguments.folder / "models", name == "untied"))
        found = measure(settings, arguments.ranks, arguments.folder / name)
        console.print(table(f"{name} head, {arguments.ranks} ranks x {arguments.max_length} tokens", settings, found))
    console.print(f"load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def make_model(folder: Path, untied: bool) -> Path:
    """The demo model, or a copy whose head has the values of the embedding; made once."""
    demo = model_folder("demo", cache_dir())
    copy = folder / "untied"
    if not untied or copy.exists():
        return copy if untied else demo
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo, dtype="auto")
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    partial = folder / "untied.partial"
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(demo).save_pretrained(partial)
    partial.rename(copy)
    return copy


def prepare(arguments: argparse.Namespace, model: Path) -> Settings:
    """What both runs have to know; the packed rows, in the order of the run, are in a file."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    with arguments.rows.open(encoding="utf-8") as source, rows.open("w", encoding="utf-8") as target:
        for line in source:
            row = json.loads(line)
            prompt, completion = row.get("prompt", row.get("question")), row.get("completion", row.get("answer"))
            target.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    settings = {
        "model": str(model),
        "dtype": arguments.dtype,
        "rank": 16,
        "rows": str(rows),
        "packed": str(folder / "packed.jsonl"),
        "max_length": arguments.max_length,
        "steps": WARM_UP + arguments.steps,
        "checkpointing": arguments.checkpointing,
    }
    settings["tokens"] = write_packed(settings, arguments.ranks)
    return settings


def write_packed(settings: Settings, num_ranks: int) -> list[int]:
    """The rows of all steps, as TRL's packing has them; returns the tokens of each step."""
    from tests.benchmarks.step_rank import run_settings

    config = RunConfig.model_validate(run_settings(settings, Path("unused")))
    data = load_data(config)
    assert padding_token(data.tokenizer) >= 0
    order, tokens, lines = row_order(config, data.rows[TRAIN]), [], []
    for step in range(settings["steps"]):
        rows = [data.rows[TRAIN][index] for index in order.of_step(step, num_ranks)]
        tokens.append(sum(len(row.input_ids) for row in rows))
        for row in rows:
            lengths = row.document_lengths.tolist()
            packed = {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist(), "seq_lengths": lengths}
            lines.append(json.dumps(packed) + "\n")
    Path(settings["packed"]).write_text("".join(lines), encoding="utf-8")
    return tokens


def measure(settings: Settings, num_ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Way -> what its ranks have noted: seconds of the slowest, peaks of the largest, losses."""
    shutil.rmtree(folder, ignore_errors=True)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    with ThreadPoolExecutor(len(WAYS)) as pool:
        runs: dict[str, Future[list[Finished]]] = {}
        for way in WAYS:
            (folder / way).mkdir(parents=True)
            (folder / way / "settings.json").write_text(json.dumps(settings))
            command = ["-m", "tests.benchmarks.step_rank", way, str(folder / way / "settings.json"), str(folder / way)]
            options: dict[str, str] = {"OMP_NUM_THREADS": str(threads), "LOCAL_SIZE": str(num_ranks)}
            runs[way] = pool.submit(
                run_ranks, [sys.executable, *command], num_ranks, folder / way / "output", timeout=3600, **options
            )
        take_turns(folder, runs, settings["steps"])
        for run in runs.values():
            for end in run.result():
                if end.code != 0:
                    raise SystemExit(end.output)
    found = {}
    for way in WAYS:
        ranks = [json.loads((folder / way / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
        peaks = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name.startswith("peak")}
        slowest = {
            name: [max(of_step) for of_step in zip(*(rank[name] for rank in ranks), strict=True)]
            for name in ("seconds", "cpu_seconds")
        }
        found[way] = {**slowest, "losses": ranks[0]["losses"], **peaks}
    return found


def take_turns(folder: Path, runs: dict[str, Future[list[Finished]]], steps: int) -> None:
    """Let the runs do a step each, who is first changing from step to step, until all are done or one has failed."""
    for step in range(steps):
        for way in WAYS if step % 2 else reversed(WAYS):
            (folder / way / f"go-{step}").touch()
            while not (folder / way / f"done-{step}").exists():
                if any(run.done() and any(end.code for end in run.result()) for run in runs.values()):
                    (folder / "failed").touch()  # nobody waits for a turn any more
                    return
                time.sleep(0.01)


def table(title: str, settings: Settings, found: dict[str, dict[str, Any]]) -> Table:
    """One line for each way, and one for their ratios: the median of the steps' own ratios."""
    shown = Table(title=title)
    for heading in (
        "",
        "tokens/s",
        "s a step (median)",
        "CPU s",
        "peak RSS, MiB",
        "before the steps",
        "GPU, MiB",
        "first loss",
    ):
        shown.add_column(heading, justify="right" if heading else "left")
    tokens = sum(settings["tokens"][WARM_UP:])
    speeds = {}
    for way, one in found.items():
        counted = one["seconds"][WARM_UP:]
        speeds[way] = tokens / sum(counted)
        peaks = [one[name] / 2**20 for name in ("peak_rss_bytes", "peak_before_steps", "peak_device_bytes")]
        cpu = median(one["cpu_seconds"][WARM_UP:])
        cells = [f"{speeds[way]:.1f}", f"{median(counted):.2f}", f"{cpu:.2f}", *(f"{peak:,.0f}" for peak in peaks)]
        shown.add_row(way, *cells, f"{one['losses'][0]:.6f}")
    shown.add_row("ours / trl", *_ratios(speeds, found))
    return shown


def _ratios(speeds: dict[str, float], found: dict[str, dict[str, Any]]) -> Sequence[str]:
    ours, trl = (found[way] for way in WAYS)
    of_steps = [b / a for a, b in zip(ours["seconds"][WARM_UP:], trl["seconds"][WARM_UP:], strict=True)]
    peaks = [ours[name] / trl[name] for name in ("peak_rss_bytes", "peak_before_steps")]
    speed = f"{speeds['ours'] / speeds['trl']:.3f} ({min(of_steps):.2f} to {max(of_steps):.2f})"
    cpu = median(ours["cpu_seconds"][WARM_UP:]) / median(trl["cpu_seconds"][WARM_UP:])
    apart = f"{abs(ours['losses'][0] - trl['losses'][0]):.1e} apart"
    return speed, f"{1 / median(of_steps):.3f}", f"{cpu:.3f}", *(f"{peak:.3f}" for peak in peaks), "", apart


if __name__ == "__main__":
    main()
