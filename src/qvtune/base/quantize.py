"""A base quantized once: an ordinary 4-bit folder of bitsandbytes' format; later starts read a quarter of the bytes.

The folder is written shard by shard into ``OUTPUT.partial`` and takes its name when it is complete. Killed and started
again, it goes on after the last whole shard, and the result is the same to the byte.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

from qvtune.base.companions import copy_companions
from qvtune.base.fingerprint import MANIFEST, Fingerprint, describe, require_unchanged
from qvtune.base.loader import Base, open_base
from qvtune.base.nf4 import BLOCK, NESTED_BLOCK, Layout, quantize_shard
from qvtune.base.shard import Whole
from qvtune.base.source import StoredTensor, open_weights, read_headers
from qvtune.config.schema import ModelSection
from qvtune.errors import UserError
from qvtune.files import sha256, write_json
from qvtune.paths import cache_dir
from qvtune.report.console import console

_PROGRESS = "progress.json"
DEFAULT_SHARD_BYTES = 1_000_000_000
Plan = dict[str, list[str]]  # output file -> tensors of the source, in the order in which that is read


def quantize(
    source: Path, output: Path, *, double_quant: bool = True, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write ``source`` with its matrices in NF4 to ``output``; never more than a shard and a matrix in memory.

    Raises UserError when the source cannot be quantized or has changed since it was read first, or ``output`` exists,
    or what is left of an earlier start was made from another source or with other settings.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists; give a new folder, or delete this one")
    base = open_base(source, ModelSection(double_quant=double_quant), torch.float32, attention="sdpa")
    if base.stored:
        raise UserError(f"{source}: its matrices are stored in 4 bits already")
    partial = output.with_name(f"{output.name}.partial")
    plan = plan_shards(base, max_shard_bytes)
    progress = _open_progress(partial, base, plan, double_quant)
    for number, (file, names) in enumerate(plan.items(), start=1):
        if file not in progress["files"]:
            write_shard(partial / file, base, names)
            progress["files"][file] = manifest_entry(partial / file)
            progress["source"] |= {name: describe(base.weights, name) for name in names}
            _write_json(partial / _PROGRESS, progress)
        console().print(f"{number}/{len(plan)} {file}")
    require_unchanged(base.weights, progress["source"], cache_dir() / "bases")
    copy_companions(source, partial)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    finish(partial, base, config, progress["files"], progress["source"])
    (partial / _PROGRESS).unlink()
    os.rename(partial, output)


def plan_shards(base: Base, max_shard_bytes: int) -> Plan:
    """Which tensors of ``base`` go into which file, in the order in which they lie in its own."""
    quantized = base.quantized()
    shards: list[list[str]] = [[]]
    size = 0
    for tensor in sorted(base.weights.values(), key=lambda tensor: (str(tensor.file), tensor.offset)):
        layout = quantized.get(tensor.name)
        needed = sum(layout.piece_bytes().values()) if layout else tensor.num_bytes
        if shards[-1] and size + needed > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor.name)
        size += needed
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return dict(zip(["model.safetensors"] if count == 1 else names, shards, strict=True))


def _open_progress(partial: Path, base: Base, plan: Plan, double_quant: bool) -> dict[str, Any]:
    """What an earlier start has finished, verified; the settings it was made with must be the same."""
    headers = {tensor.name: [str(tensor.dtype), *tensor.shape] for tensor in base.weights.values()}
    settings = {"double_quant": double_quant, "plan": plan, "headers": headers}
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    fresh: dict[str, Any] = {"identity": identity, "files": {}, "source": {}}
    partial.mkdir(parents=True, exist_ok=True)
    if not (partial / _PROGRESS).exists():
        return fresh
    progress: dict[str, Any] = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
    if progress["identity"] != identity:
        raise UserError(f"{partial} was made from another source or with other settings; delete it to start anew")
    damaged = [name for name, entry in progress["files"].items() if sha256(partial / name) != entry["sha256"]]
    if damaged:
        raise UserError([f"{partial / name} is damaged; delete {partial} to start anew" for name in damaged])
    return progress


def write_shard(path: Path, base: Base, names: Sequence[str]) -> None:
    """One file, which appears whole. Raises UserError naming tensors with values that are not finite."""
    quantized = base.quantized()
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if name in quantized:
            tensors |= _quantized_tensors(base, name.removesuffix(".weight"), quantized[name])
        else:
            tensors[name] = base.weights.read_flat(name).view(base.weights[name].shape)
    if base.weights.not_finite:
        raise UserError([f"tensor {name!r} holds NaN or infinite values" for name in sorted(base.weights.not_finite)])
    temporary = path.with_name(f".{path.name}")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _quantized_tensors(base: Base, module: str, layout: Layout) -> dict[str, torch.Tensor]:
    """One matrix as transformers stores it: by our own quantization, which is bit-equal to bitsandbytes'."""
    name = f"{module}.weight"
    pieces, offset = quantize_shard(
        lambda start, end: base.weights.read_flat(name, start, end),
        layout,
        Whole(torch.device("cpu")),
        lambda own: [own],
    )
    content = {piece: pieces[piece].view(torch.uint8)[:size] for piece, size in layout.piece_bytes().items()}
    stored = base.weights[name]
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


def manifest_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def finish(
    folder: Path, base: Base, config: dict[str, Any], files: dict[str, dict[str, Any]], source: Fingerprint
) -> None:
    """Index, config.json and manifest of a folder whose ``files`` are written, from ``config`` of ``source``."""
    written = read_headers([folder / file for file in files])
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in written.values())},
            "weight_map": {tensor.name: tensor.file.name for tensor in written.values()},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    double_quant = next(iter(base.quantized().values())).double_quant
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    _write_json(folder / "config.json", {**config, "quantization_config": quantization})
    _write_json(folder / MANIFEST, {"files": files, "source": source, "tensors": _contents(folder)})


def _contents(folder: Path) -> Fingerprint:
    """Fingerprint of the written tensors, read back from the files."""
    weights = open_weights(folder)
    for name, tensor in weights.items():
        weights.read_bytes(name, 0, tensor.num_bytes)
    return {name: describe(weights, name) for name in sorted(weights)}


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    write_json(temporary, value)
    os.replace(temporary, path)
