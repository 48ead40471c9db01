"""What a training step costs on one GPU: python -m tests.benchmarks.step_gpu [--shape llama3_8b] [--tokens 4096 8192]

Random weights in NF4, so nothing is downloaded. Four tables: dequantizing, the output head by rows per chunk, one layer
by attention implementation, and a whole micro-batch (forward and backward of all layers) with and without activation
checkpointing: tokens/s, memory, and for how long the host was busy. Without a GPU it says so and ends;
``--device cpu --shape tiny --tokens 64`` shows that everything runs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.data.batch import Batch, with_segments
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters
from qvtune.model.attention import choose_attention, prepare_attention
from qvtune.model.nf4 import NF4Linear, quantize_shard
from qvtune.model.shard import Whole
from qvtune.model.skeleton import build_skeleton
from qvtune.tasks import causal_lm
from qvtune.tasks.causal_lm import CausalLMObjective, FrozenHeadLoss
from tests.plan.shapes import SHAPES

ATTENTIONS = ("flash_attention_3", "flash_attention_2", "varlen", "sdpa")
CHUNK_ROWS = (128, 256, 512, 1024, 2048, 4096)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
REPETITIONS = 5


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="llama3_8b", choices=[*SHAPES, "tiny"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384], help="of a packed row")
    parser.add_argument("--document", type=int, default=512, help="tokens of each document of a row")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("skipped: no CUDA device; on a GPU machine run `python -m tests.benchmarks.step_gpu`")
    device, console = torch.device(arguments.device), Console(width=120)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{arguments.shape} on {name}, torch {torch.__version__}, bfloat16")
    config = model_config(arguments.shape)
    console.print(dequantizing(config, device))
    console.print(heads(config, device, arguments.tokens[0]))
    console.print(attentions(config, device, arguments.tokens, arguments.document))
    console.print(micro_batches(config, device, arguments.tokens, arguments.document))


def model_config(shape: str) -> Any:
    """transformers' configuration of the shape."""
    settings = dict(next(iter(SHAPES.values())), **TINY, vocab_size=331) if shape == "tiny" else dict(SHAPES[shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of one call, and of the host in it; the mean of some calls after one that is not counted."""
    work()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPETITIONS):
        work()
    of_host = time.perf_counter() - started
    _wait(device)
    return (time.perf_counter() - started) / REPETITIONS, of_host / REPETITIONS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(work: Callable[[], object], device: torch.device) -> tuple[str, ...]:
    """Milliseconds, those of the host, and the peak of memory above what was there in GiB; or why there is none."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        total, host = seconds(work, device)
    except torch.OutOfMemoryError:
        return "out of memory", "", ""
    peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}" if device.type == "cuda" else ""
    return f"{1e3 * total:.2f}", f"{1e3 * host:.2f}", peak


def table(title: str, *headings: str) -> Table:
    """All columns but the first are numbers."""
    shown = Table(title=title)
    for index, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if index else "left")
    return shown


def random_matrix(in_features: int, out_features: int, device: torch.device) -> NF4Linear:
    """A matrix of normal numbers, quantized as the loader does it."""
    linear = NF4Linear(in_features, out_features, bias=False, double_quant=True, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def read(start: int, end: int) -> torch.Tensor:
        return torch.randn(end - start, generator=generator) * 0.02

    pieces, offset = quantize_shard(read, linear.layout, Whole(torch.device("cpu")))
    for name, piece in pieces.items():
        setattr(linear, name, nn.Parameter(piece.to(device), requires_grad=False))
    linear.offset = offset.to(device)
    return linear


def dequantizing(config: Any, device: torch.device) -> Table:
    """One of the largest matrices of a layer."""
    linear = random_matrix(config.hidden_size, config.intermediate_size, device)
    read = sum(linear.layout.piece_bytes().values())
    written = 2 * linear.layout.num_weights
    total, _ = seconds(linear.matrix, device)
    shown = table("dequantizing NF4", "matrix", "ms", "GB/s read and written", "weights/ns")
    name = f"{config.intermediate_size} x {config.hidden_size}"
    shown.add_row(
        name,
        f"{1e3 * total:.3f}",
        f"{(read + written) / total / 1e9:.0f}",
        f"{linear.layout.num_weights / total / 1e9:.1f}",
    )
    return shown


def heads(config: Any, device: torch.device, tokens: int) -> Table:
    """Loss and gradients of the hidden states of as many label tokens."""
    linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=torch.bfloat16)
    head = FrozenHeadLoss(linear.requires_grad_(False))
    hidden = torch.randn(tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
    labels = torch.randint(config.vocab_size, (tokens,), device=device)
    shown = table(f"output head, {tokens} label tokens", "rows per chunk", "ms", "host ms", "peak GiB")
    for rows in CHUNK_ROWS:
        with _chunks_of(rows):
            shown.add_row(str(rows), *measured(lambda: head(hidden, labels, with_gradient=True), device))
    return shown


def _chunks_of(rows: int) -> Any:
    return patch.multiple(causal_lm, _CHUNK_LOGITS=0, MIN_CHUNK_ROWS=dict.fromkeys(causal_lm.MIN_CHUNK_ROWS, rows))


def available() -> Iterator[tuple[str, str]]:
    """Each attention that runs here, and "" ; or its name, and why it does not."""
    for name in ATTENTIONS:
        try:
            choose_attention(name, torch.bfloat16)
            yield name, ""
        except UserError as error:
            yield name, str(error)


def attentions(config: Any, device: torch.device, lengths: list[int], document: int) -> Table:
    """Forward and backward of a model of one layer, the output head included, which all have in common."""
    shown = table(f"one layer, documents of {document} tokens", "attention", "tokens", "ms", "host ms", "peak GiB")
    shallow = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1})
    for name, reason in available():
        if reason:
            shown.add_row(name, "", reason, "", "")
            continue
        for deterministic in (True,) if name == "sdpa" else (True, False):
            objective = make_objective(shallow, name, device, checkpointing=False, deterministic=deterministic)
            for tokens in lengths:
                batch = make_batch(config, tokens, document).to(device)
                label = name if deterministic else f"{name}, not deterministic"
                shown.add_row(label, str(tokens), *measured(lambda: objective(batch).backward(), device))  # noqa: B023
    return shown


def micro_batches(config: Any, device: torch.device, lengths: list[int], document: int) -> Table:
    """Of the whole model, with the attention that ``auto`` chooses."""
    name, reason = choose_attention("auto", torch.bfloat16)
    shown = table(
        f"micro-batch, attention {name} ({reason})", "checkpointing", "tokens", "tokens/s", "ms", "host ms", "peak GiB"
    )
    for checkpointing in (False, True):
        objective = make_objective(config, name, device, checkpointing=checkpointing, deterministic=True)
        for tokens in lengths:
            batch = make_batch(config, tokens, document).to(device)
            found = measured(lambda: objective(batch).backward(), device)  # noqa: B023
            speed = "" if found[0].startswith("out") else f"{1e3 * tokens / float(found[0]):,.0f}"
            shown.add_row(str(checkpointing), str(tokens), speed, *found)
    return shown


def make_objective(
    config: Any, attention: str, device: torch.device, *, checkpointing: bool, deterministic: bool
) -> CausalLMObjective:
    """The module that is trained; matrices of one shape have the same values."""
    prepare_attention(attention, deterministic=deterministic)
    skeleton = build_skeleton(config, ModelSection(), torch.bfloat16, attention)
    made: dict[tuple[int, ...], NF4Linear] = {}
    for module in skeleton.modules():
        if isinstance(module, NF4Linear):
            shape = module.layout.shape
            if shape not in made:
                made[shape] = random_matrix(shape[1], shape[0], device)
            source = made[shape]
            for name, parameter in source.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.data.clone(), requires_grad=False))
            module.offset = source.offset
        else:
            for name, empty in list(module.named_parameters(recurse=False)):
                values = torch.randn(empty.shape, device=device, dtype=torch.bfloat16) * 0.02
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    if config.tie_word_embeddings:
        skeleton.tie_weights()
    model = add_adapters(skeleton.to(device), AdapterSection(rank=16), "random", 0)
    if checkpointing:
        skeleton.gradient_checkpointing_enable({"use_reentrant": False})
    return CausalLMObjective(model).train()


def make_batch(config: Any, tokens: int, document: int) -> Batch:
    """One row of documents of equal length, with a label at each token."""
    ids = torch.randint(config.vocab_size, (1, tokens)).numpy()
    lengths = [min(document, tokens - start) for start in range(0, tokens, document)]
    return with_segments(ids, ids.copy(), lengths)


if __name__ == "__main__":
    main()
