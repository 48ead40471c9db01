"""Run folders as training leaves them, without training."""

import json
import math
import time as clock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

HOSTILE = '<script>alert("x")</script><img src="http://192.0.2.1/x.png"> & | *a*'
START = 1_800_000_000.0


def step(number: int, time: float, **changes: Any) -> dict[str, Any]:
    """The event of a step."""
    loss = 1.5 + 1.5 * math.exp(-number / 400) + 0.1 * math.sin(number * 12.9898)
    fields = {"step": number, "loss": loss, "tokens": 1400, "label_tokens": 530, "seconds": 0.5, "grad_norm": 0.4}
    rates = {"q": 1e-3 / (1 + number / 1000), "v": 4e-3 / (1 + number / 1000)}
    memory = {"peak_rss_bytes": 1_500_000_000 + number, "peak_device_bytes": 0}
    return {"event": "step", "time": time, **fields, "lr": rates, **memory, **changes}


def events(num_steps: int, first: int = 0, *, every: int = 0, is_complete: bool = True) -> Iterator[dict[str, Any]]:
    """Those of one start from step ``first`` on; ``every``: steps between evaluations and checkpoints."""
    time = START + 0.6 * first + (1000 if first else 0)
    start = {
        "step": first,
        "max_steps": num_steps,
        "world_size": 2,
        "resumed_from": f"step-{first:08d}" if first else "",
    }
    yield {"event": "run_start", "time": time, **start, "trained_parameters": {"q": 552960, "v": 368640}}
    yield {
        "event": "base_loaded",
        "time": time,
        "seconds": 2.5,
        "bytes_read": 1e8,
        "base_bytes": 8e7,
        "peak_rss_bytes": 6e8,
    }
    for number in range(first, num_steps + 1):
        time += 0.6
        if number > first:
            yield step(number, time)
        if every and number % every == 0 and (number > first or not first):
            evaluation = {"loss": 2.7 - number / (2 * num_steps), "token_accuracy": 0.5 + number / (4 * num_steps)}
            yield {"event": "eval", "time": time, "step": number, **evaluation, "seconds": 0.05}
        if every and number % every == 0 and number > first:
            norms = {name: [factor * number / num_steps] * 30 for name, factor in (("q", 0.6), ("v", 1.9))}
            fields = {"bytes": 14_836_488, "blocked_seconds": 0.05, "update_norms": norms}
            yield {"event": "checkpoint", "time": time, "step": number, **fields}
    if is_complete:
        yield {"event": "run_end", "time": time, "step": num_steps, "reason": "completed", "peak_rss_bytes": 2e9}


def write_run(run_dir: Path, *starts: Iterator[dict[str, Any]]) -> Path:
    """A run folder with these events, whose texts would harm a page that does not escape them."""
    run_dir.mkdir(parents=True)
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for start in starts for event in start)
    config = {
        "run_dir": str(run_dir),
        "model": {"name_or_path": HOSTILE, "quantization": "nf4"},
        "adapter": {"method": "lora", "projections": ["q", "v"], "rank": 16},
        "optimizer": {"lr": 1e-3, "lr_multipliers": {"v": 4.0}, "max_grad_norm": 1.0},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lengths = [
        {"min_tokens": 32, "max_tokens": 63, "documents": 193},
        {"min_tokens": 64, "max_tokens": 127, "documents": 96},
    ]
    samples = [[{"spans": [["user: " + HOSTILE, False], ["the answer", True]], "label": None}]]
    train = {"source": HOSTILE, "rows": 1517, "documents": 289, "tokens": 359026, "passes": 0.08, "samples": samples}
    write_json(run_dir / "data.json", {"data.train": {**train, "document_lengths": lengths}})
    write_json(run_dir / "environment.json", {"packages": {"torch": "2.13.0"}, "commit": "abc", "argv": [HOSTILE]})
    return run_dir


def write_json(path: Path, content: Any) -> None:
    """In a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def answers(number: int, *texts: str, seconds: float = 0.0) -> dict[str, Any]:
    """The event of a generation after step ``number``, ``seconds`` after the first start."""
    found = [{"prompt": "2 + 2?", "answer": text, "expected": "4", "tokens": 3} for text in texts]
    return {
        "event": "generation",
        "time": START + seconds,
        "step": number,
        "seconds": 1.0,
        "exact_match": 0.5,
        "answers": found,
    }


def merge_report(run_dir: Path) -> None:
    """That of a model that was merged into ``merged/``."""
    updates = [
        {"name": f"model.layers.{layer}.self_attn.{module}.weight", "ratio": ratio * (layer + 1)}
        for layer in range(12)
        for module, ratio in (("q_proj", 0.004), ("v_proj", 0.03))
    ]
    limits = {"top1_agreement": 1.0, "max_abs_difference": 1e-3, "mean_kl": 1e-5}
    proof = {"positions": 1360, "top1_agreement": 1.0, "max_abs_difference": 8.2e-5, "mean_kl": 9e-12, "limits": limits}
    losses = {"label_tokens": 560, "before": 3.02, "adapted": 2.51, "merged": 2.51}
    report = {"format": "merged", "step": 20, "updates": updates, "proof": proof, "losses": losses}
    write_json(run_dir / "merged" / "merge_report.json", report)


def wait_for(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until it is so. Raises AssertionError after ``seconds``."""
    deadline = clock.monotonic() + seconds
    while not is_so():
        assert clock.monotonic() < deadline
        clock.sleep(0.05)


def append(run_dir: Path, *entries: dict[str, object]) -> None:
    """Further events of a run."""
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
