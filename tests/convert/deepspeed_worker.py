"""One rank that trains a LoRA with other people's trainers and saves what they save; started by test_deepspeed.py.

    deepspeed_worker.py BASE OUTPUT JOB...        JOB: trainer-2, trainer-3, sft-2, sft-3 (the ZeRO stage)

OUTPUT/JOB/checkpoint-2 then holds DeepSpeed's files and, beside them, the adapter that the library has gathered itself.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


class Rows(Dataset[dict[str, Any]]):
    """Random tokens."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 300, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def adapter() -> LoraConfig:
    """Every kind of trained tensor that a language model's adapter can have."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=3,  # so that nothing divides evenly
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 5},
        modules_to_save=["lm_head", "norm"],  # norms are a parameter group of their own, without weight decay
        init_lora_weights=False,
    )


def settings(stage: int) -> dict[str, Any]:
    """TrainingArguments of two short steps, with two parameter groups (weight decay or none), as Trainer makes them."""
    return {
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    }


def main() -> None:
    base, output, *jobs = sys.argv[1:]
    deepspeed.ops.__compatible_ops__ = {}  # none is compiled, which takes a minute: as in qvtune's process_group.start
    for job in jobs:
        library, _, stage = job.partition("-")
        folder = Path(output) / job
        if library == "trainer":
            arguments = TrainingArguments(output_dir=str(folder), **settings(int(stage)))
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter())
            trainer = Trainer(model, arguments, train_dataset=Rows())
        else:
            trainer = sft(base, folder, int(stage))
        trainer.train()
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()


def sft(base: str, folder: Path, stage: int) -> Any:
    """TRL's trainer of conversations."""
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(output_dir=str(folder), max_length=64, **settings(stage))
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=Table.from_dict({"text": ["hello world", "what does it do"] * 12}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=adapter(),
    )


if __name__ == "__main__":
    main()
