"""``make demo``: train a real model on two processes, evaluate, merge, prove, compare answers, and show a summary."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.rule import Rule
from rich.table import Table
from torch import nn

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.console import console
from qvtune.convert.convert import convert
from qvtune.distributed.command import run_alone
from qvtune.embedded.data import demo_files
from qvtune.model.loader import load_whole
from qvtune.model.source import model_folder
from qvtune.report.metrics import read_metrics
from qvtune.report.run_page import write_report
from qvtune.storage.paths import cache_dir
from qvtune.versions import repository

_RECIPE = Path("launch/recipes/demo.yaml")
_NUM_SAMPLES, _SAMPLE_TOKENS = 3, 48


def main() -> None:
    """Run the demo; if training fails, exit with its code."""
    out, started = console(), time.monotonic()
    config = load_config(repository() / _RECIPE)
    num_ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    command = ["deepspeed", "--num_gpus", str(num_ranks), "launch/train.py", "--config", str(_RECIPE)]
    out.print(Rule(f"1/3  train: {' '.join(command)}"))
    trained = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], cwd=repository(), check=False)
    if trained.returncode != 0:
        sys.exit(trained.returncode)

    run_dir = repository() / config.run_dir
    merged = run_dir / "merged"
    out.print(Rule(f"2/3  merge: python launch/convert.py {config.run_dir} --output {config.run_dir}/merged"))
    convert(run_dir, merged)
    write_report(run_dir)  # with the proof

    out.print(Rule("3/3  answers to held-out questions, before and after training"))
    _show_answers(config, merged)
    out.print(_summary(config, run_dir, merged, num_ranks, time.monotonic() - started))


def _show_answers(config: RunConfig, merged: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    folder = model_folder(config.model.name_or_path, cache_dir(), config.model.revision)
    before = load_whole(folder, config.model, torch.float32)
    after = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with demo_files(cache_dir())[1].open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(_NUM_SAMPLES)]
    for row in rows:
        question, reference = row["messages"]
        table = Table(title=question["content"], title_justify="left", show_header=False, width=120)
        table.add_row("before", _answer(before, tokenizer, question))
        table.add_row("after", _answer(after, tokenizer, question))
        table.add_row("reference", reference["content"])
        console().print(table)


def _answer(model: nn.Module, tokenizer: Any, question: dict[str, str]) -> str:
    """The greedy answer, at most ``_SAMPLE_TOKENS`` tokens."""
    inputs = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.eval().generate(**inputs, max_new_tokens=_SAMPLE_TOKENS, do_sample=False)  # type: ignore[operator]
    answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def _summary(config: RunConfig, run_dir: Path, merged: Path, num_ranks: int, seconds: float) -> Table:
    before, *_, after = (entry["loss"] for entry in read_metrics(run_dir, "eval"))
    steps, end = read_metrics(run_dir, "step"), read_metrics(run_dir, "run_end")[-1]
    loaded = read_metrics(run_dir, "base_loaded")[-1]
    adapter = run_dir / "checkpoints" / "latest" / "adapter_model.safetensors"
    proof = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))["proof"]
    speed = sum(entry["tokens"] for entry in steps) / sum(entry["seconds"] for entry in steps)
    table = Table(title="qvtune demo", show_header=False)
    for name, value in {
        "held-out loss": f"{before:.4f} -> {after:.4f} nats per token ({after / before - 1:+.1%})",
        "merged = base + adapter": f"top-1 agreement {proof['top1_agreement']:.2%} on {proof['positions']} positions",
        "speed": f"{speed:.0f} tokens/s on {num_ranks} ranks",
        "peak memory per rank": f"{end['peak_rss_bytes'] / 1e9:.2f} GB",
        "base on one rank": f"{loaded['base_bytes'] / 1e6:.0f} MB",
        "adapter": f"{adapter.stat().st_size / 1e6:.1f} MB",
        "run": f"{config.run_dir}/ (report.html, metrics.jsonl, checkpoints/latest, tensorboard/, config.yaml)",
        "merged model": f"{config.run_dir}/merged/ (AutoModelForCausalLM.from_pretrained)",
        "time": f"{seconds / 60:.1f} minutes",
        "next": f"deepspeed launch/train.py --config {_RECIPE} data.train=ROWS.jsonl data.eval=null run_dir=runs/mine",
    }.items():
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    sys.exit(run_alone(main))
