"""Filling a skeleton: each rank reads, quantizes and keeps its own part of every tensor, and nothing else.

The order is that of the skeleton's parameters on all ranks, since quantizing gathers block statistics.
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qvtune.base.model import build_skeleton, read_model_config
from qvtune.base.nf4 import Gather, NF4Linear, quantize_shard
from qvtune.base.shard import Placement, Whole, resident_bytes
from qvtune.base.source import BaseWeights, open_weights
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError


@dataclass(frozen=True)
class LoadReport:
    """What loading cost this rank. Bytes; seconds of wall time."""

    seconds: float
    bytes_read: int
    base_bytes: int
    peak_rss_bytes: int


def load_whole(
    folder: Path, model: ModelSection, dtype: torch.dtype, attention: str = "sdpa", device: torch.device | None = None
) -> nn.Module:
    """The base as training sees it, whole in one process, without DeepSpeed."""
    config = read_model_config(folder, model)
    weights = open_weights(folder)
    skeleton = build_skeleton(config, model, dtype, attention)
    check_tensors(skeleton, weights)
    fill(skeleton, weights, Whole(device or torch.device("cpu")), dtype, gather=lambda own: [own])
    return skeleton


def check_tensors(skeleton: nn.Module, weights: BaseWeights) -> None:
    """Compare names and shapes with the skeleton's before anything is read. Raises UserError with all differences."""
    expected = _expected_shapes(skeleton)
    problems = []
    for name, shape in expected.items():
        if name not in weights:
            problems.append(f"{weights.folder}: tensor {name!r} {list(shape)} is missing")
        elif weights[name].shape != shape:
            problems.append(
                f"{weights.folder}: tensor {name!r} has shape {list(weights[name].shape)}, expected {list(shape)}"
            )
    tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - set(expected)
    buffers = {name for name, _ in skeleton.named_buffers()}
    for name in sorted(weights.keys() - expected.keys() - tied - buffers):
        problems.append(f"{weights.folder}: tensor {name!r} {list(weights[name].shape)} has no place in the model")
    if problems:
        raise UserError([*problems, "config.json and the weights do not belong together (model.name_or_path)"])


def _expected_shapes(skeleton: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes as a Hugging Face checkpoint has them; a tied tensor under its first name only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in skeleton.named_parameters():
        module = skeleton.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, NF4Linear) or name.endswith(".bias"):
            shapes[name] = tuple(parameter.shape)
        elif name.endswith(".weight"):
            shapes[name] = module.layout.shape
    return shapes


def fill(
    skeleton: nn.Module, weights: BaseWeights, placement: Placement, dtype: torch.dtype, gather: Gather
) -> LoadReport:
    """Replace the skeleton's empty parameters by loaded ones; collective when ``placement`` has several ranks.

    Quantization starts from the stored precision, so that the same base has the same bits in every compute dtype.
    """
    started = time.monotonic()
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied tensors are read once
    for path, module in skeleton.named_modules():
        if isinstance(module, NF4Linear):
            _fill_quantized(path, module, weights, placement, gather)
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty.device.type == "meta":
                if empty not in filled:
                    filled[empty] = _load_plain(f"{path}.{name}", empty, weights, placement, dtype)
                setattr(module, name, filled[empty])
    skeleton.to(placement.device)  # the buffers; parameters are there already
    return LoadReport(
        seconds=time.monotonic() - started,
        bytes_read=weights.bytes_read,
        base_bytes=sum(resident_bytes(parameter) for parameter in skeleton.parameters()),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _fill_quantized(path: str, module: NF4Linear, weights: BaseWeights, placement: Placement, gather: Gather) -> None:
    name = f"{path}.weight"
    pieces, offset = quantize_shard(
        lambda start, end: weights.read_flat(name, start, end), module.layout, placement, gather
    )
    for piece_name, numel in module.layout.piece_numel().items():
        setattr(module, piece_name, placement.parameter((numel,), pieces[piece_name]))
    module.offset = offset


def _load_plain(
    name: str, empty: nn.Parameter, weights: BaseWeights, placement: Placement, dtype: torch.dtype
) -> nn.Parameter:
    """A tensor that is not quantized: this rank's range, cast to the compute dtype, zeros as padding."""
    total = empty.numel()
    start, end = placement.shard.span(total)
    piece = torch.zeros(placement.shard.numel(total), dtype=dtype)
    piece[: end - start] = weights.read_flat(name, start, end).to(dtype)
    return placement.parameter(tuple(empty.shape), piece)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
