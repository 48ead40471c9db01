"""NF4 matrices whose codes and statistics are stored flat, so that ZeRO-3 can cut them anywhere.

Format (QLoRA, arXiv 2305.14314, as bitsandbytes writes it): a matrix is flattened and cut into blocks of 64 weights;
a block has one fp32 absmax and 64 codes of 4 bits. With double quantization the absmax values, less their mean over
the whole matrix (``offset``), are quantized to 8 bits in blocks of 256 with one fp32 scale each.

The pieces are kept in the compute dtype, reinterpreted: DeepSpeed gathers the parameters of a module in one collective
only if their dtype is the same. Bits are never converted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import nn

from qvtune.model.linear import FrozenLinear
from qvtune.model.quantizer import BLOCK, quantize_nf4
from qvtune.model.shard import Placement, Shard
from qvtune.system import one_thread

NESTED_BLOCK = 256  # absmax values that share a scale
BLOCK_BYTES = BLOCK // 2
_CHUNK = 2**20  # weights read at a time

ReadFlat = Callable[[int, int], torch.Tensor]  # [start, end) of the flattened matrix -> 1-D tensor, any float dtype


@dataclass(frozen=True)
class Layout:
    """Sizes of one stored matrix of ``shape``; ``storage`` is the dtype that the bytes are viewed as."""

    shape: tuple[int, int]
    double_quant: bool
    storage: torch.dtype

    @property
    def num_weights(self) -> int:
        """Weights of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 weights, the last one perhaps shorter."""
        return math.ceil(self.num_weights / BLOCK)

    @property
    def num_nested_blocks(self) -> int:
        """Blocks of 256 absmax values, the last one perhaps shorter."""
        return math.ceil(self.num_blocks / NESTED_BLOCK)

    def piece_bytes(self) -> dict[str, int]:
        """Name of each stored piece -> its bytes."""
        codes = math.ceil(self.num_weights / 2)
        if not self.double_quant:
            return {"weight": codes, "absmax": 4 * self.num_blocks}
        return {"weight": codes, "absmax": self.num_blocks, "nested_absmax": 4 * self.num_nested_blocks}

    def piece_numel(self) -> dict[str, int]:
        """Name of each stored piece -> its elements of ``storage``, rounded up."""
        return {name: math.ceil(size / self.storage.itemsize) for name, size in self.piece_bytes().items()}

    def byte_span(self, piece: str, shard: Shard) -> tuple[int, int]:
        """``[start, end)`` of the bytes of a piece that a rank stores, the padding at the end left out."""
        start, end = shard.span(self.piece_numel()[piece])
        size = self.piece_bytes()[piece]
        return min(start * self.storage.itemsize, size), min(end * self.storage.itemsize, size)


def quantize_shard(
    read: ReadFlat, layout: Layout, placement: Placement
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This rank's part of a quantized matrix, bit-equal to cutting ``bitsandbytes.quantize_4bit`` of the whole.

    Reads only the blocks of 64 weights that the rank's codes lie in. The absmax of all blocks is gathered once
    (1/16 byte a weight, freed at once), because its mean enters the double quantization. All is computed on the CPU,
    whatever the placement's device: bitsandbytes' CUDA kernels give other bytes (``qvtune.model.quantizer``).

    Returns the pieces (1-D, dtype ``layout.storage``, padded with zeros to the shard's size) and the fp32 ``offset``,
    all in host memory.
    """
    shard = placement.shard
    start, end = layout.byte_span("weight", shard)
    first_block, last_block = start // BLOCK_BYTES, math.ceil(end / BLOCK_BYTES)
    codes, absmax = _quantize(read, first_block * BLOCK, min(last_block * BLOCK, layout.num_weights))
    absmax = _gather_absmax(absmax[_owned(start) - first_block :], layout, placement)

    offset = torch.zeros(())
    contents = {"weight": codes[start - first_block * BLOCK_BYTES : end - first_block * BLOCK_BYTES]}
    if layout.double_quant:
        # A sum's last bit depends on how many threads share it; the same base must have the same bits everywhere.
        with one_thread():
            offset = absmax.mean()
        start, end = layout.byte_span("absmax", shard)
        contents["absmax"] = _nested(absmax, offset, start, end)[0]
        start, end = layout.byte_span("nested_absmax", shard)
        scales = _nested(absmax, offset, start // 4 * NESTED_BLOCK, math.ceil(end / 4) * NESTED_BLOCK)[1]
        contents["nested_absmax"] = scales.view(torch.uint8)[start % 4 : start % 4 + end - start]
    else:
        start, end = layout.byte_span("absmax", shard)
        contents["absmax"] = absmax.view(torch.uint8)[start:end]
    numel = {name: shard.numel(total) for name, total in layout.piece_numel().items()}
    return {name: as_storage(piece, layout.storage, numel[name]) for name, piece in contents.items()}, offset


def _quantize(read: ReadFlat, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and fp32 absmax of ``[start, end)``, of which only ``_CHUNK`` weights are in memory at a time."""
    parts = [quantize_nf4(torch.empty(0))]  # with more ranks than the matrix has elements there is nothing else
    for first in range(start, end, _CHUNK):
        parts.append(quantize_nf4(read(first, min(first + _CHUNK, end)), torch.get_num_threads()))
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


def first_own_weight(layout: Layout, shard: Shard) -> int:
    """First weight of the first block that no rank before this one reads too."""
    return min(_owned(layout.byte_span("weight", shard)[0]) * BLOCK, layout.num_weights)


def _owned(byte: int) -> int:
    """First block that begins at or after a byte of the codes: its absmax is contributed by the rank that holds it."""
    return math.ceil(byte / BLOCK_BYTES)


def _gather_absmax(own: torch.Tensor, layout: Layout, placement: Placement) -> torch.Tensor:
    """fp32 absmax of all blocks, from each rank those that begin in its part of the codes."""
    counts = _owned_counts(layout, placement.shard.num_ranks)
    count = counts[placement.shard.rank]
    padded = own.new_zeros(max(counts))
    padded[:count] = own[:count]
    parts = placement.all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@lru_cache
def _owned_counts(layout: Layout, num_ranks: int) -> list[int]:
    """Absmax values that each rank contributes; a model has few shapes, a thousand ranks take milliseconds."""
    spans = [layout.byte_span("weight", rank) for rank in Shard(0, num_ranks).peers()]
    return [_owned(end) - _owned(start) for start, end in spans]


def _nested(absmax: torch.Tensor, offset: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of ``[start, end)`` of ``absmax - offset``, and the scales of the blocks of 256 that cover them."""
    if start >= end:
        return absmax.new_empty(0, dtype=torch.uint8), absmax.new_empty(0)
    first = start // NESTED_BLOCK * NESTED_BLOCK
    covering = absmax[first : math.ceil(end / NESTED_BLOCK) * NESTED_BLOCK]
    codes, state = bnb.quantize_blockwise(covering - offset, blocksize=NESTED_BLOCK)
    return codes[start - first : end - first], state.absmax


def as_storage(piece: torch.Tensor, storage: torch.dtype, numel: int) -> torch.Tensor:
    """Bytes -> ``numel`` elements of ``storage``, zeros at the end."""
    padded = piece.new_zeros(numel * storage.itemsize)
    padded[: piece.numel()] = piece
    return padded.view(storage)


@lru_cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 NF4 values and the 256 values of the nested 8-bit code."""
    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


def _quant_state(
    pieces: Mapping[str, torch.Tensor],
    offset: torch.Tensor,
    layout: Layout,
    start: int,
    end: int,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, bnb.QuantState]:
    """Codes and statistics of weights ``[start, end)``, views; ``start`` is that of a nested block."""
    content = {name: pieces[name].view(torch.uint8)[:size] for name, size in layout.piece_bytes().items()}
    nf4_values, nested_values = tables(content["weight"].device)
    blocks = slice(start // BLOCK, math.ceil(end / BLOCK))
    state: dict[str, Any] = {"shape": torch.Size(shape), "dtype": layout.storage, "code": nf4_values}
    if layout.double_quant:
        scales = content["nested_absmax"].view(torch.float32)[start // BLOCK // NESTED_BLOCK :]
        nested = bnb.QuantState(absmax=scales, code=nested_values, blocksize=NESTED_BLOCK, dtype=torch.float32)
        state |= {"absmax": content["absmax"][blocks], "offset": offset, "state2": nested}
    else:
        state |= {"absmax": content["absmax"].view(torch.float32)[blocks]}
    codes = content["weight"][start // 2 : math.ceil(end / 2)]
    return codes.view(-1, 1), bnb.QuantState(blocksize=BLOCK, quant_type="nf4", **state)


def dequantize_range(
    pieces: Mapping[str, torch.Tensor], offset: torch.Tensor, layout: Layout, start: int, end: int
) -> torch.Tensor:
    """Weights ``[start, end)`` of the flattened matrix (1-D, ``layout.storage``), bit-equal to cutting the whole."""
    unit = BLOCK * NESTED_BLOCK
    first, last = start // unit * unit, min(math.ceil(end / unit) * unit, layout.num_weights)
    codes, state = _quant_state(pieces, offset, layout, first, last, (1, last - first))
    return bnb.dequantize_4bit(codes, quant_state=state).view(-1)[start - first : end - first]


class NF4Linear(FrozenLinear):
    """``y = x W^T + b`` with a frozen 4-bit W, dequantized for each use and never kept.

    Parameters (all frozen, 1-D, dtype of the compute): ``weight`` = codes, ``absmax``, ``nested_absmax`` (double
    quantization); buffer ``offset`` (fp32 scalar). ZeRO-3 gathers them together before the module runs.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, double_quant: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.layout = Layout((out_features, in_features), double_quant, dtype)
        for name, numel in self.layout.piece_numel().items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(numel, device="meta", dtype=dtype), requires_grad=False)
            )
        self.register_buffer("offset", torch.zeros(()), persistent=False)

    def quant_state(self) -> tuple[torch.Tensor, bnb.QuantState]:
        """Packed codes (uint8) and statistics, as bitsandbytes wants them; views of the gathered parameters."""
        pieces = {name: getattr(self, name).data for name in self.layout.piece_bytes()}
        assert isinstance(self.offset, torch.Tensor)
        return _quant_state(pieces, self.offset, self.layout, 0, self.layout.num_weights, self.layout.shape)

    def matrix(self) -> torch.Tensor:
        """W, dequantized, [out_features, in_features], in the compute dtype."""
        codes, state = self.quant_state()
        return bnb.dequantize_4bit(codes, quant_state=state)

    def extra_repr(self) -> str:
        """As nn.Linear, and the format."""
        return f"{super().extra_repr()}, nf4, double_quant={self.layout.double_quant}"
