"""One rank of the benchmark: python -m tests.benchmarks.checkpoint_rank {qvtune,trainer} MODEL RESULTS STEPS

Trains STEPS short steps with a checkpoint after each, then resumes from the last. Rank 0 writes RESULTS/costs.json.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers import trainer as transformers_trainer

from qvtune.checkpoint import engine as checkpoint_engine
from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.report.metrics import read_metrics
from qvtune.train import loop, run_folder

RANK, ALPHA, LENGTH = 16, 32, 64
Costs = dict[str, Any]


class Timed:
    """Seconds of each call of the functions that it replaces."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def patched(self, owner: Any, name: str) -> Any:
        """Within this context calls of ``owner.name`` are timed, those of all ranks together."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds.append(time.monotonic() - started)

        return patch.object(owner, name, timed)


def qvtune(model: Path, results: Path, steps: int) -> Costs:
    """This project: the run's own ``blocked_seconds``; resuming verifies all files and loads adapter and moments."""
    run_dir = results / "run"
    config = {
        "run_dir": str(run_dir),
        "model": {"name_or_path": str(model), "quantization": "none"},
        "adapter": {"rank": RANK, "alpha": ALPHA},
        "data": {"train": "demo", "max_length": LENGTH},
        "train": {"max_steps": steps, "global_batch_size": process_group.world_size(), "save_every": 1},
    }
    assert loop.train(RunConfig.model_validate(config)) == loop.EXIT_DONE
    resume = Timed()
    with ExitStack() as stack:
        stack.enter_context(resume.patched(run_folder.checkpoint_folder, "newest_whole"))
        for name in ("load_trained", "load_optimizer"):
            stack.enter_context(resume.patched(checkpoint_engine, name))
        longer = {**config, "train": {**config["train"], "max_steps": steps + 1}}  # type: ignore[dict-item]
        assert loop.train(RunConfig.model_validate(longer)) == loop.EXIT_DONE
    written = read_metrics(run_dir, "checkpoint")[: steps - 1]  # for the last one a run waits
    return {
        "bytes": written[0]["bytes"],
        "blocked_seconds": [entry["blocked_seconds"] for entry in written],
        "resume_seconds": sum(resume.seconds),
    }


class Rows(Dataset[dict[str, Any]]):
    """Random tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(model: Path, results: Path, steps: int) -> Costs:
    """transformers' Trainer with DeepSpeed's ZeRO-3 and PEFT: the same adapter, masters and moments."""
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }

    def make(max_steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(results / "trainer"),
            max_steps=max_steps,
            save_steps=1,
            per_device_train_batch_size=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            deepspeed=deepspeed,
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
        return Trainer(adapted, arguments, train_dataset=Rows())

    saved, loaded = Timed(), Timed()
    with saved.patched(Trainer, "_save_checkpoint"):
        make(steps).train()
    checkpoint = results / "trainer" / f"checkpoint-{steps}"
    num_bytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    with loaded.patched(transformers_trainer, "deepspeed_load_checkpoint"):
        make(steps + 1).train(resume_from_checkpoint=str(checkpoint))
    return {"bytes": num_bytes, "blocked_seconds": saved.seconds, "resume_seconds": sum(loaded.seconds)}


def main() -> None:
    """Measure, and write the largest of the ranks."""
    kind, model, results, steps = sys.argv[1:]
    process_group.start()
    costs = {"qvtune": qvtune, "trainer": trainer}[kind](Path(model), Path(results), int(steps))
    of_ranks = process_group.all_gather_object(costs)
    if process_group.is_main():
        largest = {
            "bytes": costs["bytes"],
            "blocked_seconds": max(
                sorted(one["blocked_seconds"])[len(one["blocked_seconds"]) // 2] for one in of_ranks
            ),
            "resume_seconds": max(one["resume_seconds"] for one in of_ranks),
        }
        (Path(results) / "costs.json").write_text(json.dumps(largest))
    process_group.stop()


if __name__ == "__main__":
    main()
