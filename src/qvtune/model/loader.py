"""Filling a skeleton: each rank reads, quantizes and keeps its own part of every tensor, and nothing else.

The order is that of the skeleton's parameters on all ranks, since quantizing gathers block statistics.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model import prequantized
from qvtune.model.families import FAMILIES, ends_in, names_of_base, trained_matrices
from qvtune.model.fingerprint import ContentChecksums, Fingerprint
from qvtune.model.head import HeadSettings, make_new_modules
from qvtune.model.kept import KeptBase, read_again
from qvtune.model.nf4 import Layout, NF4Linear, first_own_weight, quantize_shard
from qvtune.model.prequantized import StoredNF4
from qvtune.model.shard import Placement, Whole, resident_bytes
from qvtune.model.skeleton import freeze, plain_skeleton, read_model_config
from qvtune.storage.safetensors import StoredTensor, TensorFiles, TensorSource, open_weights
from qvtune.system import peak_rss_bytes, return_freed_memory


@dataclass(frozen=True)
class LoadReport:
    """What loading cost this rank. Bytes; seconds of wall time."""

    seconds: float
    bytes_read: int
    base_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Base:
    """An opened base that fits its architecture: what ``fill`` needs, and nothing read yet but headers.

    ``skeleton``: the architecture of what is read, under the names of the files. ``model``: all of the model, which is
    more where a task has a head: that is in ``new_modules`` (paths in ``model``), and filled. ``head_note``: from what.
    """

    skeleton: nn.Module
    weights: TensorFiles
    stored: Mapping[str, StoredNF4]
    model: nn.Module
    new_modules: tuple[str, ...] = ()
    head_note: str = ""

    def quantized(self) -> dict[str, Layout]:
        """Layout of every matrix that training sees in NF4, by the name of its tensor."""
        return quantized_layouts(self.skeleton)

    def tensors(self) -> dict[str, StoredTensor]:
        """The model's tensors as they lie in the files; of a matrix stored in 4 bits the codes, with its own shape."""
        return {
            name: replace(tensor, shape=self.stored[module].shape)
            if (module := name[: -len(".weight")]) in self.stored
            else tensor
            for name, tensor in self.weights.items()
            if not prequantized.belongs(name, self.stored)
        }


def quantized_layouts(skeleton: nn.Module) -> dict[str, Layout]:
    """Layout of every NF4 matrix of a skeleton, by the name of its tensor."""
    modules = skeleton.named_modules()
    return {f"{name}.weight": module.layout for name, module in modules if isinstance(module, NF4Linear)}


def open_base(
    folder: Path,
    model: ModelSection,
    dtype: torch.dtype,
    attention: str,
    adapter: AdapterSection | None = None,
    head: HeadSettings | None = None,
) -> Base:
    """The folder's architecture without memory, its linear layers ours, compared with its tensors.

    Matrices that ``adapter`` trains themselves (method ``full``) are not quantized. With ``head`` the model is the one
    for sequence classification. Raises UserError with all that does not fit, by name, before anything else is read.
    """
    config = read_model_config(folder, model)
    files = open_weights(folder, model.allow_pickle)
    family = FAMILIES[config.model_type]
    weights = files.renamed(names_of_base(files, config.model_type, has_head=head is not None))
    stored = prequantized.stored_matrices(weights)
    trained = trained_matrices(adapter, family) if adapter is not None else ()
    _check_settings(folder, model, stored, trained)
    new_modules: tuple[str, ...] = ()
    note = ""
    whole: Any
    if head is None:
        pooler = "pooler.dense.weight" in weights  # checkpoints of tasks that do without it have none
        whole = skeleton = plain_skeleton(config, model, dtype, attention, with_pooler=pooler)
    else:
        stored_labels = list(config.id2label.values())
        whole = plain_skeleton(config, model, dtype, attention, head=head)
        new_modules, note = make_new_modules(whole, files, head, stored_labels, dtype)
        skeleton = whole.base_model if family.is_encoder else whole
    freeze(skeleton, model, dtype, stored.keys(), trained)
    check_tensors(skeleton, weights, stored)
    return Base(skeleton, weights, stored, whole.requires_grad_(False), new_modules, note)


def load_whole(
    folder: Path,
    model: ModelSection,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device: torch.device | None = None,
    adapter: AdapterSection | None = None,
) -> nn.Module:
    """The base as training with ``adapter`` sees it, whole in one process, without DeepSpeed."""
    base = open_base(folder, model, dtype, attention, adapter)
    fill(base, Whole(device or torch.device("cpu")), dtype)
    return base.model


def _check_settings(
    folder: Path, model: ModelSection, stored: Mapping[str, StoredNF4], trained: tuple[str, ...]
) -> None:
    if stored and model.quantization != "nf4":
        raise UserError(
            f"{folder}: the weights are stored in 4 bits; set model.quantization: nf4, or give the original weights"
        )
    if any(entry.double_quant != model.double_quant for entry in stored.values()):
        found = not model.double_quant
        raise UserError(f"{folder}: the weights are stored with double_quant={found}; set model.double_quant: {found}")
    if rounded := [name for name in stored if ends_in(name, trained)]:
        raise UserError(
            f"{folder}: {rounded[0]} and {len(rounded) - 1} other matrices that adapter.method: full trains are stored "
            "in 4 bits, which cannot be trained; give the folder of the original weights"
        )


def check_tensors(skeleton: nn.Module, weights: TensorSource, stored: Mapping[str, StoredNF4]) -> None:
    """Compare names and shapes with the skeleton's before anything is read. Raises UserError with all differences."""
    shapes = _expected_shapes(skeleton)
    packed = {module: f"{module}.weight" for module in stored}
    for name in packed.values():
        shapes.pop(name, None)
    problems = []
    for name, shape in shapes.items():
        if name not in weights:
            problems.append(f"{weights.folder}: tensor {name!r} {list(shape)} is missing")
        elif weights[name].shape != shape:
            found = list(weights[name].shape)
            problems.append(f"{weights.folder}: tensor {name!r} has shape {found}, expected {list(shape)}")
    problems += _packed_problems(skeleton, weights, stored)
    tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - shapes.keys()
    known = shapes.keys() | tied | {name for name, _ in skeleton.named_buffers()}
    for name in sorted(weights.keys() - known):
        if not prequantized.belongs(name, stored):
            problems.append(f"{weights.folder}: tensor {name!r} {list(weights[name].shape)} has no place in the model")
    if problems:
        raise UserError([*problems, "config.json and the weights do not belong together"])


def _expected_shapes(skeleton: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes as a Hugging Face checkpoint has them; a tied tensor under its first name only.

    What is not empty was made, and is not expected in a file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in skeleton.named_parameters():
        if not parameter.is_meta:
            continue
        module = skeleton.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, NF4Linear) or name.endswith(".bias"):
            shapes[name] = tuple(parameter.shape)
        elif name.endswith(".weight"):
            shapes[name] = module.layout.shape
    return shapes


def _packed_problems(skeleton: nn.Module, weights: TensorSource, stored: Mapping[str, StoredNF4]) -> list[str]:
    problems = []
    modules = dict(skeleton.named_modules())
    for path, entry in stored.items():
        module = modules.get(path)
        if not isinstance(module, NF4Linear):
            problems.append(f"{weights.folder}: 4-bit matrix {path!r} has no place in the model")
        elif module.layout.shape != entry.shape:
            found, expected = list(entry.shape), list(module.layout.shape)
            problems.append(f"{weights.folder}: 4-bit matrix {path!r} has shape {found}, expected {expected}")
        else:
            for name, size in prequantized.expected_bytes(path, module.layout).items():
                if name not in weights:
                    problems.append(f"{weights.folder}: tensor {name!r} is missing")
                elif weights[name].num_bytes != size:
                    found_size = weights[name].num_bytes
                    problems.append(f"{weights.folder}: tensor {name!r} has {found_size} bytes, expected {size}")
    return problems


def fill(
    base: Base,
    placement: Placement,
    dtype: torch.dtype,
    between_modules: Callable[[], None] = lambda: None,
    kept: KeptBase | None = None,
) -> tuple[LoadReport, Fingerprint]:
    """Replace the skeleton's empty parameters by loaded ones; collective when ``placement`` has several ranks.

    Quantization starts from the stored precision, so that the same base has the same bits in every compute dtype.
    ``between_modules`` is called equally often, between the same modules, on all ranks. What ``kept`` has is not read
    again. Raises UserError, on all ranks, naming the tensors that hold NaN or infinite values.
    """
    started = time.monotonic()
    checksums = ContentChecksums(base.weights)
    keep = read_again if kept is None else kept.of(checksums, dtype, placement.shard)
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied tensors are read once
    for path, module in base.skeleton.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            between_modules()
        if isinstance(module, NF4Linear):
            read = partial(quantized_pieces, path, module.layout, base, placement, checksums)
            _fill_quantized(module, placement, *keep(f"{path} {module.layout}", read))
            return_freed_memory()
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty.device.type == "meta":
                if empty not in filled:
                    read_plain = partial(_read_plain, f"{path}.{name}", empty, placement, dtype, checksums)
                    filled[empty] = placement.parameter(tuple(empty.shape), keep(f"{path}.{name}", read_plain))
                setattr(module, name, filled[empty])
    if placement.shard.rank == 0:
        for name in prequantized.descriptions(base.weights, base.stored):  # all ranks have read them
            checksums.set_whole(name, base.weights.read(name))
    base.model.to(placement.device)  # buffers and new modules; what was read is there already
    content = checksums.fingerprint(placement)
    report = LoadReport(
        seconds=time.monotonic() - started,
        bytes_read=base.weights.bytes_read,
        base_bytes=sum(resident_bytes(parameter) for parameter in base.skeleton.parameters()),
        peak_rss_bytes=peak_rss_bytes(),
    )
    return report, content


def _fill_quantized(
    module: NF4Linear, placement: Placement, pieces: Mapping[str, torch.Tensor], offset: torch.Tensor
) -> None:
    for piece_name, numel in module.layout.piece_numel().items():
        setattr(module, piece_name, placement.parameter((numel,), pieces[piece_name]))
    module.offset = offset


def quantized_pieces(
    path: str,
    layout: Layout,
    base: Base,
    placement: Placement,
    checksums: ContentChecksums | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This rank's part of the codes and statistics of module ``path``, and the offset; read, or quantized now.

    What is read is added to ``checksums``; of a block that two ranks read, the first rank adds it.
    """
    if path in base.stored:
        pieces = prequantized.read_shard(base.weights, path, layout, placement.shard, checksums)
        return pieces, torch.tensor(base.stored[path].offset)
    name, first_own = f"{path}.weight", first_own_weight(layout, placement.shard)

    def read(start: int, end: int) -> torch.Tensor:
        data = base.weights.read(name, start, end)
        if checksums is not None:
            others = min(max(first_own - start, 0), end - start)
            checksums.add(name, data[others:], start + others)
        return data

    return quantize_shard(read, layout, placement)


def _read_plain(
    name: str, empty: nn.Parameter, placement: Placement, dtype: torch.dtype, checksums: ContentChecksums
) -> torch.Tensor:
    """A tensor that is not quantized: this rank's range, cast to the compute dtype, zeros as padding."""
    total = empty.numel()
    start, end = placement.shard.span(total)
    stored = checksums.weights.read(name, start, end)
    checksums.add(name, stored, start)
    piece = stored.to(dtype)
    if padding := placement.shard.numel(total) - len(piece):
        piece = nn.functional.pad(piece, (0, padding))
    return piece
