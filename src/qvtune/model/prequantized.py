"""Matrices that a checkpoint stores in bitsandbytes' own 4-bit format: codes and statistics are taken as they are.

Beside ``X.weight`` (packed codes) lie ``X.weight.absmax``, ``.quant_map``, with double quantization ``.nested_absmax``
and ``.nested_quant_map``, and ``.quant_state.bitsandbytes__nf4``: JSON as bytes with shape, block sizes and offset.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb

from qvtune.errors import UserError
from qvtune.model.fingerprint import ContentChecksums
from qvtune.model.nf4 import NESTED_BLOCK, Layout, as_storage
from qvtune.model.quantizer import BLOCK
from qvtune.model.shard import Shard
from qvtune.storage.safetensors import TensorFiles

_STATE = ".weight.quant_state.bitsandbytes__"
_PIECES = {"weight": ".weight", "absmax": ".weight.absmax", "nested_absmax": ".weight.nested_absmax"}
_MAPS = (".weight.quant_map", ".weight.nested_quant_map")


@dataclass(frozen=True)
class StoredNF4:
    """The statistics' description of one stored matrix."""

    shape: tuple[int, int]
    double_quant: bool
    offset: float


def stored_matrices(weights: TensorFiles) -> dict[str, StoredNF4]:
    """Module name -> description of every matrix that is stored in 4 bits; empty for an ordinary checkpoint.

    Raises UserError listing the matrices whose format is another than NF4 in blocks of 64 (nested: 256).
    """
    found, problems = {}, []
    for name in weights:
        if _STATE in name:
            module, _, kind = name.partition(_STATE)
            state = json.loads(bytes(weights.read(name).tolist()))
            if problem := _unsupported(kind, state):
                problems.append(f"{weights.folder}: {module} is stored as {problem}")
            else:
                rows, columns = state["shape"]
                found[module] = StoredNF4((rows, columns), "nested_offset" in state, state.get("nested_offset", 0.0))
    if problems:
        raise UserError(problems)
    _check_maps(weights, found)
    return found


def _unsupported(kind: str, state: Mapping[str, Any]) -> str | None:
    if kind != "nf4":
        return f"{kind}; only nf4 can be trained on"
    if state["blocksize"] != BLOCK or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        sizes = f"{state['blocksize']} and {state.get('nested_blocksize')}"
        return f"nf4 in blocks of {sizes}; only {BLOCK} and {NESTED_BLOCK} can be read"
    return None


def _check_maps(weights: TensorFiles, stored: Mapping[str, StoredNF4]) -> None:
    """The tables of values must be the ones that the kernels use."""
    expected = (bnb.get_4bit_type("nf4", device="cpu"), bnb.create_dynamic_map())
    problems = [
        f"{weights.folder}: tensor {module + suffix!r} is not bitsandbytes' table of values"
        for module in stored
        for suffix, values in zip(_MAPS, expected, strict=True)
        if module + suffix in weights and not torch.equal(weights.read(module + suffix), values)
    ]
    if problems:
        raise UserError(problems)


def expected_bytes(module: str, layout: Layout) -> dict[str, int]:
    """Stored name -> bytes of the pieces of one matrix."""
    return {module + _PIECES[piece]: size for piece, size in layout.piece_bytes().items()}


def belongs(name: str, stored: Mapping[str, StoredNF4]) -> bool:
    """Whether a tensor is part of a stored matrix."""
    module, dot, _ = name.partition(".weight.")
    return bool(dot) and module in stored


def descriptions(weights: TensorFiles, stored: Mapping[str, StoredNF4]) -> list[str]:
    """Tensors that describe stored matrices, tables and JSON: what every rank reads whole."""
    shared = []
    for name in weights:
        if belongs(name, stored):
            module, _, rest = name.partition(".weight.")
            is_piece = rest == "absmax" or (rest == "nested_absmax" and stored[module].double_quant)
            shared += [] if is_piece else [name]
    return shared


def read_shard(
    weights: TensorFiles, module: str, layout: Layout, shard: Shard, checksums: ContentChecksums | None = None
) -> dict[str, torch.Tensor]:
    """This rank's bytes of the pieces, as ``nf4.quantize_shard`` returns them; added to ``checksums``."""
    pieces = {}
    for piece, total in layout.piece_numel().items():
        name, (start, end) = module + _PIECES[piece], layout.byte_span(piece, shard)
        content = weights.read_bytes(name, start, end)
        if checksums is not None:
            checksums.add(name, content, start)
        pieces[piece] = as_storage(content, layout.storage, shard.numel(total))
    return pieces
