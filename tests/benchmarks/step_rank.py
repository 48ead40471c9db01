"""One rank of the benchmark: python -m tests.benchmarks.step_rank {ours,trl} SETTINGS.json FOLDER

Before each optimizer step the rank waits for its turn, a file FOLDER/go-N. Writes FOLDER/rank-R.json.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.distributed.command import before_imports
from qvtune.system import peak_rss_bytes

# As in the documentation of transformers and TRL.
ZERO_3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


class Turns:
    """Seconds and losses of the steps that this rank was let do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_before_steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wait until it is this step's turn; it ends when all ranks have done it."""
        number = len(self.seconds)
        while not (self._folder / f"go-{number}").exists():
            if (self._folder.parent / "failed").exists():
                raise SystemExit("the other run has failed")
            time.sleep(0.01)
        self.peak_before_steps = self.peak_before_steps or peak_rss_bytes()
        process_group.barrier()
        started, cpu_started = time.monotonic(), time.process_time()
        yield
        process_group.barrier()
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.seconds.append(time.monotonic() - started)
        if process_group.is_main():
            (self._folder / f"done-{number}").touch()


def ours(settings: dict[str, Any], folder: Path, turns: Turns) -> None:
    """This project's loop as a command runs it."""
    from qvtune.train import loop

    optimizer_step: Callable[..., tuple[float, float]] = loop._optimizer_step

    def step(*arguments: Any) -> tuple[float, float]:
        with turns.step():
            loss, grad_norm = optimizer_step(*arguments)
        turns.losses.append(loss)
        return loss, grad_norm

    with patch.object(loop, "_optimizer_step", step):
        assert loop.train(RunConfig.model_validate(run_settings(settings, folder))) == loop.EXIT_DONE


def run_settings(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "run_dir": str(folder / "run"),
        "deepspeed": "zero3.json",
        "model": {"name_or_path": settings["model"], "quantization": "nf4", "dtype": settings["dtype"]},
        "adapter": {"projections": ["q", "v"], "rank": settings["rank"], "alpha": 2 * settings["rank"]},
        "optimizer": {"lr": 1e-4},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
        "data": {"train": {"path": settings["rows"]}, "max_length": settings["max_length"]},
        "train": {
            "max_steps": settings["steps"],
            "global_batch_size": process_group.world_size(),
            "activation_checkpointing": settings["checkpointing"],
        },
        "checkpoint": {"resume": "never"},
    }


def trl(settings: dict[str, Any], folder: Path, turns: Turns) -> None:
    """TRL's trainer on the same packed rows in the same order, with its documented set-up for QLoRA and ZeRO-3."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Alternating(TrainerCallback):  # type: ignore[misc]
        """The turns, and the losses that are logged."""

        turn: Any = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.turn = turns.step()
            self.turn.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turn.__exit__(None, None, None)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                turns.losses.append(logs["loss"])

    dtype = getattr(torch, settings["dtype"])
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        deepspeed=ZERO_3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=settings["steps"],
        max_length=settings["max_length"],
        packing=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        gradient_checkpointing=settings["checkpointing"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
    )
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    rows = [json.loads(line) for line in Path(settings["packed"]).read_text(encoding="utf-8").splitlines()]
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=["q_proj", "v_proj"]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], quantization_config=four_bit, dtype=dtype),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=adapter,
        callbacks=[Alternating()],
    )
    trainer.train()


def main() -> None:
    """Train, and note what it has cost."""
    way, folder = sys.argv[1], Path(sys.argv[3])
    settings = json.loads(Path(sys.argv[2]).read_text())
    turns = Turns(folder)
    if way == "ours":
        before_imports()
    process_group.start()
    {"ours": ours, "trl": trl}[way](settings, folder, turns)
    device_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    result = {
        "seconds": turns.seconds,
        "cpu_seconds": turns.cpu_seconds,
        "losses": turns.losses,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_before_steps": turns.peak_before_steps,
        "peak_device_bytes": device_peak,
    }
    (folder / f"rank-{process_group.rank()}.json").write_text(json.dumps(result))
    process_group.stop()


if __name__ == "__main__":
    main()
