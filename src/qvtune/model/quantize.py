"""A base quantized once: an ordinary 4-bit folder of bitsandbytes' format; later starts read a quarter of the bytes."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

import qvtune
from qvtune.config.outputs import NF4_SHARD_BYTES
from qvtune.config.schema import ModelSection
from qvtune.console import console
from qvtune.errors import UserError, naming_setting
from qvtune.model.companions import copy_companions
from qvtune.model.fingerprint import MANIFEST, ContentChecksums, Fingerprint, require_unchanged
from qvtune.model.loader import open_base
from qvtune.model.nf4 import NESTED_BLOCK, Layout, quantize_shard
from qvtune.model.quantizer import BLOCK
from qvtune.model.shard import Whole
from qvtune.storage.atomic import atomic_file
from qvtune.storage.files import sha256, write_json
from qvtune.storage.partial import PartialOutput, partial_output, require_free
from qvtune.storage.paths import cache_dir
from qvtune.storage.safetensors import StoredTensor, TensorSource, open_weights, read_headers
from qvtune.storage.writer import FilePlans, TensorPlan, WrittenFile, checksum_of, plan_files, write_index
from qvtune.system import return_freed_memory


def quantize(source: Path, output: Path, *, double_quant: bool = True, max_shard_bytes: int = NF4_SHARD_BYTES) -> None:
    """Write ``source`` with its matrices in NF4 to ``output``; never more than a shard and a matrix in memory.

    A start with the arguments of one that was killed goes on after its last whole shard, and ends with the same bytes.
    Raises UserError when the source cannot be quantized or has changed since it was read first, or ``output`` exists,
    or what is left of an earlier start was made from another source or with other settings.
    """
    require_free(output)
    with naming_setting("BASE"):
        base = open_base(source, ModelSection(double_quant=double_quant), torch.float32, attention="sdpa")
    if base.stored:
        raise UserError(f"{source}: its matrices are stored in 4 bits already")
    made_from = {
        "qvtune": qvtune.__version__,
        "base": base.weights.stamps(),
        "double_quant": double_quant,
        "max_shard_bytes": max_shard_bytes,
    }
    with partial_output(output, made_from) as partial:
        layouts = base.quantized()
        write_shards(partial, base.weights, layouts, plan_shards(base.weights, layouts, max_shard_bytes))
        copy_companions(source, partial.folder)
        written_from = finish(partial, double_quant, json.loads((source / "config.json").read_text(encoding="utf-8")))
        require_unchanged(base.weights, written_from, cache_dir() / "bases")


def plan_shards(weights: TensorSource, layouts: Mapping[str, Layout], max_shard_bytes: int) -> FilePlans:
    """Which tensors go into which file, in the order in which they are stored now.

    ``layouts`` are those of the tensors that are quantized. Each tensor counts with the bytes that it will take; the
    description of a quantized one, a few hundred bytes, is left out.
    """
    in_order = sorted(weights.values(), key=lambda tensor: (str(tensor.file), tensor.offset))
    return plan_files((_plan(tensor, layouts.get(tensor.name)) for tensor in in_order), max_shard_bytes)


def _plan(tensor: StoredTensor, layout: Layout | None) -> TensorPlan:
    num_bytes = sum(layout.piece_bytes().values()) if layout else tensor.num_bytes
    return TensorPlan(tensor.name, torch.uint8, (num_bytes,))


def write_shards(
    partial: PartialOutput,
    weights: TensorSource,
    layouts: Mapping[str, Layout],
    files: FilePlans,
    notes: Callable[[set[str]], dict[str, Any]] = lambda _: {},
) -> None:
    """Write those of ``files`` that an earlier start has not, with what ``notes`` says of the tensors of each."""
    checksums = ContentChecksums(weights)

    def noted(file: str, names: Sequence[str]) -> dict[str, Any]:
        path = partial.folder / file
        manifest = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        source = {name: checksums.describe(name) for name in names}
        return {"manifest": manifest, "source": source} | notes(set(names))

    partial.require_room(files)
    for number, (file, plans) in enumerate(files.items(), start=1):
        names = [plan.name for plan in plans]
        partial.write(
            file, bind(_write_shard, names=names, layouts=layouts, checksums=checksums), bind(noted, file, names)
        )
        return_freed_memory()
        console().print(f"{number}/{len(files)} {file}")


def _write_shard(
    path: Path, names: Sequence[str], layouts: Mapping[str, Layout], checksums: ContentChecksums
) -> WrittenFile:
    """One file, which appears whole. Raises UserError naming tensors with values that are not finite."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if name in layouts:
            tensors |= _quantized_tensors(name, layouts[name], checksums)
        else:
            tensors[name] = _read(name, checksums).view(checksums.weights[name].shape)
    checksums.require_finite()
    with atomic_file(path) as private:
        save_file(tensors, private, metadata={"format": "pt"})
    return checksum_of(path)


def _quantized_tensors(name: str, layout: Layout, checksums: ContentChecksums) -> dict[str, torch.Tensor]:
    """One matrix as transformers stores it: by our own quantization, which is bit-equal to bitsandbytes'."""
    read = bind(_read, name, checksums)
    pieces, offset = quantize_shard(read, layout, Whole(torch.device("cpu")))
    content = {piece: pieces[piece].view(torch.uint8)[:size] for piece, size in layout.piece_bytes().items()}
    stored = checksums.weights[name]
    absmax = content["absmax"] if layout.double_quant else content["absmax"].view(torch.float32)
    tensors = {
        name: content["weight"].view(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": bnb.get_4bit_type("nf4", device="cpu"),
        f"{name}.quant_state.bitsandbytes__nf4": _description(stored, layout, offset),
    }
    if layout.double_quant:
        tensors[f"{name}.nested_absmax"] = content["nested_absmax"].view(torch.float32)
        tensors[f"{name}.nested_quant_map"] = bnb.create_dynamic_map()
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _read(name: str, checksums: ContentChecksums, start: int = 0, end: int | None = None) -> torch.Tensor:
    data = checksums.weights.read(name, start, end)
    checksums.add(name, data, start)
    return data


def _description(stored: StoredTensor, layout: Layout, offset: torch.Tensor) -> torch.Tensor:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "shape": list(layout.shape),
    }
    if layout.double_quant:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def finish(partial: PartialOutput, double_quant: bool, config: dict[str, Any]) -> Fingerprint:
    """Write index, config.json (``config`` and how it is quantized) and manifest of a folder whose shards are there.

    Returns what they were made from.
    """
    folder = partial.folder
    noted = {file: entry["notes"] for file, entry in partial.progress["files"].items()}
    write_index(folder, {file: list(read_headers([folder / file]).values()) for file in noted})
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    write_json(folder / "config.json", {**config, "quantization_config": quantization})
    source = {name: entry for notes in noted.values() for name, entry in notes["source"].items()}
    files = {file: notes["manifest"] for file, notes in noted.items()}
    write_json(folder / MANIFEST, {"files": files, "source": source, "tensors": _contents(folder)})
    return source


def _contents(folder: Path) -> Fingerprint:
    """Fingerprint of the written tensors, read back from the files."""
    weights = open_weights(folder)
    checksums = ContentChecksums(weights)
    for name in weights:
        checksums.add(name, weights.read_bytes(name))
    return {name: checksums.describe(name) for name in sorted(weights)}
