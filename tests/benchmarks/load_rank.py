"""One rank of the benchmark: python -m tests.benchmarks.load_rank {zero3,transformers} FOLDER RESULTS

Writes RESULTS/rank-N.json. Time and memory begin after all imports, when all ranks are there.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qvtune.config.schema import ModelSection
from qvtune.distributed import process_group
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import ZeroPartition
from qvtune.storage.safetensors import open_weights
from qvtune.system import peak_rss_bytes
from tests.model.one_of_many import resident_bytes_now

DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
Costs = dict[str, int]


def zero3(folder: Path) -> tuple[nn.Module, Costs]:
    """The loader of this project: each rank its part."""
    base = open_base(folder, ModelSection(quantization="nf4"), torch.bfloat16, "sdpa")
    placement = ZeroPartition(DEEPSPEED, torch.bfloat16)
    report, _ = fill(base, placement, torch.bfloat16)
    return base.skeleton, {"bytes_read": report.bytes_read, "base_bytes": report.base_bytes}


def transformers(folder: Path) -> tuple[nn.Module, Costs]:
    """What every rank does today: the whole model, which DeepSpeed cuts afterwards (not measured)."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    # It maps the files; each rank touches every tensor.
    bytes_read = sum(tensor.num_bytes for tensor in open_weights(folder).values())
    return model, {"bytes_read": bytes_read, "base_bytes": sum(map(_bytes_with_statistics, model.parameters()))}


def _bytes_with_statistics(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    statistics = 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    return int(parameter.nbytes + statistics)


def main() -> None:
    """Load and note what it has cost."""
    load = {"zero3": zero3, "transformers": transformers}[sys.argv[1]]
    process_group.start()
    process_group.barrier()
    idle = resident_bytes_now()
    started = time.monotonic()
    model, costs = load(Path(sys.argv[2]))
    seconds = time.monotonic() - started
    peak = peak_rss_bytes()
    assert any(True for _ in model.parameters()), "the model must live until its memory has been read"
    result = {**costs, "seconds": seconds, "peak_bytes": peak, "added_bytes": peak - idle}
    (Path(sys.argv[3]) / f"rank-{process_group.rank()}.json").write_text(json.dumps(result))
    process_group.stop()


if __name__ == "__main__":
    main()
