"""What an optimizer step needs on one GPU, estimated from shapes alone: in time for `deepspeed: auto` to choose.

``qvtune.plan`` simulates the same exactly, in a process group that pretends, which a run cannot have beside its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvtune.config.deepspeed import LayerSizes
from qvtune.config.schema import RunConfig
from qvtune.config.zero_stage import choose_stage
from qvtune.model.layers import decoder_layers, layer_sizes
from qvtune.model.shard import resident_bytes
from qvtune.tasks.causal_lm import chunk_rows

_BUCKETS = 20_000_000  # bytes that ds_configs/ allocates for the reduction of gradients
# Elements that a layer keeps for backward, for each token: of its norms and its attention, in hidden sizes; of its MLP,
# in sizes of that; of each norm beyond two. tests/plan/test_step_memory.py holds them against simulations.
_KEPT, _KEPT_OF_MLP, _KEPT_BY_NORM = 8, 3, 6
_LOGIT_BYTES = 10  # of a chunk: in bfloat16, in float32, and its gradients


@dataclass(frozen=True)
class Gpus:
    """``memory``: bytes of the smallest one; ``per_node``: 1 where nodes have different numbers."""

    memory: int
    per_node: int
    nodes: int

    @property
    def number(self) -> int:
        """All of them: the number of ranks."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank, estimated from shapes; activations of a full micro-batch, rather too many than too few.

    Attributes:
        base: all frozen parameters, as they are stored.
        gathered: most that is gathered at a time where the base is sharded.
        trained: trained parameters and their gradients.
        shared_state: float32 masters and AdamW's moments, which all ranks share.
        activations: what is kept for backward, and the layer or the logits at work.
    """

    base: int
    gathered: int
    trained: int
    shared_state: int
    activations: int

    def other_bytes(self, num_ranks: int) -> int:
        """All but the base."""
        return self.trained + self.shared_state // num_ranks + self.activations + _BUCKETS

    def choose(self, gpus: Gpus) -> tuple[str, str]:
        """The file of ds_configs/ for these GPUs, and the arithmetic in one line."""
        other = self.other_bytes(gpus.number)
        choice = choose_stage(self.base, self.gathered, other, gpus.memory, gpus.per_node, gpus.nodes)
        if choice.fits:
            return choice.file, choice.reason
        hint = "set train.activation_checkpointing or a smaller data.max_length, or take zero3_offload.json"
        return choice.file, f"{choice.file}, which may not fit: {choice.reason}; {hint}"


def step_memory(run: RunConfig, model: nn.Module, model_config: Any, dtype: torch.dtype) -> StepMemory:
    """Of what ``add_adapters`` returns, which may be without memory; ``model_config``: transformers' configuration."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = layer_sizes(model)
    return StepMemory(
        base=sum(resident_bytes(parameter) for parameter in frozen),
        gathered=_gathered_numel(frozen, layers) * dtype.itemsize,
        trained=2 * trained * dtype.itemsize,
        shared_state=12 * trained,
        activations=_activation_bytes(run, model, model_config, dtype.itemsize),
    )


def _gathered_numel(frozen: list[nn.Parameter], layers: LayerSizes) -> int:
    """Two layers, and a matrix outside of them: the embedding or the head, while a layer is prefetched."""
    return 2 * layers.gathered_numel + max(parameter.numel() for parameter in frozen)


def _activation_bytes(run: RunConfig, model: nn.Module, config: Any, itemsize: int) -> int:
    tokens = run.train.micro_batch_size * run.data.max_length
    hidden = tokens * config.hidden_size * itemsize
    layers = decoder_layers(model)
    kept = tokens * max(_kept_numel(layer, config) for layer in layers) * itemsize
    if run.model.attention == "eager":  # scores, their softmax in float32 and in the compute dtype
        kept += tokens * run.data.max_length * config.num_attention_heads * (2 * itemsize + 4)
    logits = 0
    if run.task == "causal_lm":
        rows = min(tokens, chunk_rows(config.vocab_size, "cuda"))
        logits = rows * config.vocab_size * _LOGIT_BYTES + 2 * hidden
    of_layers = len(layers) * (hidden if run.train.activation_checkpointing else kept)
    return int(of_layers + 5 * hidden + max(logits, 2 * kept if run.train.activation_checkpointing else kept))


def _kept_numel(layer: nn.Module, config: Any) -> float:
    """Elements that a layer keeps for the backward pass of one token."""
    norms = sum(type(module).__name__.endswith("Norm") for module in layer.modules())
    own: float = _KEPT * config.hidden_size + _KEPT_OF_MLP * config.intermediate_size
    own += _KEPT_BY_NORM * max(0, norms - 2) * config.hidden_size
    return own + sum(_kept_by_adapters(layer))


def _kept_by_adapters(layer: nn.Module) -> Iterator[float]:
    """Dropped inputs and their mask; of DoRA, also outputs before the scale."""
    for module in layer.modules():
        if hasattr(module, "lora_A") and hasattr(module, "in_features"):
            layer_of_peft: Any = module
            dropped = any(isinstance(one, nn.Dropout) for one in module.modules())
            scaled = len(layer_of_peft.lora_magnitude_vector) > 0
            yield 1.5 * (layer_of_peft.in_features * dropped + layer_of_peft.out_features * scaled)
