"""The same training without this project's model, loss and loop: transformers, PEFT and torch in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qvtune.config.schema import RunConfig
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.order import rows_of_step
from qvtune.data.packing import PackedRow
from qvtune.tasks.causal_lm import TASK
from tests.support.lab import MAX_GRAD_NORM, Lab

# Linear, 5 steps, warmup_ratio 0.3 = 2 steps, then in 3 equal steps towards min_ratio 0.1 for a sixth step; by hand.
MULTIPLIERS = (0.5, 1.0, 1.0, 0.7, 0.4)

Load = Callable[[Path], Any]


def four_bit_model(folder: Path) -> Any:
    """As transformers loads it. In training mode, because bitsandbytes has other kernels for inference on a CPU."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    return model.train()


def plain_model(folder: Path) -> Any:
    """In float32, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rounded_model(folder: Path) -> Any:
    """Plain float32 matrices that hold the values of the 4-bit ones."""
    plain = plain_model(folder)
    for name, module in four_bit_model(folder).named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            plain.get_submodule(name).weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state)
    return plain


def token_rows(lab: Lab) -> TokenRows:
    """The rows that a run of ``lab`` trains on."""
    config = RunConfig.model_validate(lab.config("reference"))
    tokenizer = AutoTokenizer.from_pretrained(lab.folder / "model")
    return build_token_rows(config.data.train_sources[0], config.data, tokenizer, TASK, lab.folder / "tokens")


def summed_loss(model: Any, row: PackedRow) -> torch.Tensor:
    """Of the documents of a row, each by itself."""
    total, start = torch.zeros(()), 0
    for length in row.document_lengths.tolist():
        ids, labels = (torch.tensor(part[start : start + length]).long() for part in (row.input_ids, row.labels))
        logits_TV = model(input_ids=ids[None]).logits[0]
        total = total + cross_entropy(logits_TV[:-1], labels[1:], reduction="sum")
        start += length
    return total


def adapted_model(folder: Path, *, quantized: bool = True, **lora: Any) -> Any:
    """PEFT's adapter on q and v, beside the values of 4-bit matrices; its first values as a run of seed 0 has them.

    ``lora``: more settings of PEFT's configuration.
    """
    base = rounded_model(folder) if quantized else plain_model(folder)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **lora)
    return get_peft_model(base, config)


def own_parameters_model(folder: Path, *, quantized: bool, kind: str = "weight") -> Any:
    """The matrices or the biases of q and v themselves; matrices that are not trained perhaps with values of 4 bits."""
    plain: Any = plain_model(folder)
    model = (rounded_model(folder) if quantized else plain_model(folder)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith((f"q_proj.{kind}", f"v_proj.{kind}")):
            parameter.data.copy_(plain.get_parameter(name))
            parameter.requires_grad_(True)
    return model


def train(lab: Lab, model: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of ``lab.config(...)`` without changes but that of the model."""
    config, rows = RunConfig.model_validate(lab.config("reference")), token_rows(lab)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    q, v = ([parameter for name, parameter in trained.items() if key in name] for key in ("q_proj", "v_proj"))
    assert len(q) == len(v) > 0 and len(trained) == len(q) + len(v)
    optimizer = torch.optim.AdamW([{"params": q, "rate": 1e-2}, {"params": v, "rate": 4e-2}], weight_decay=0.0)
    losses, norms = [], []
    for step, multiplier in enumerate(MULTIPLIERS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * multiplier
        mine = [rows[int(index)] for index in rows_of_step(step, 6, len(rows), config.train.seed)]
        num_labels = sum(int((row.labels != -100).sum()) for row in mine)
        loss = torch.stack([summed_loss(model, row) for row in mine]).sum() / num_labels
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), max_norm=MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms
