"""The one quantizer: NF4 codes and block maxima, computed on the CPU with exact operations, wherever a run takes place.

bitsandbytes' CPU and CUDA kernels give different bytes (other codes of zero blocks, other rounding of the double
quantization), so a base that was quantized on a GPU would not be the one that a merge on a CPU sees. These results are
bit-equal to ``bitsandbytes.functional.quantize_4bit`` on a CPU, and about seven times faster: NF4 has 16 values, so a
code is the number of the 15 midpoints between them that are smaller than the scaled weight.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from bitsandbytes import functional as bnb
from numpy.typing import NDArray

BLOCK = 64  # weights that share an absmax
_CHUNK = 2**16  # weights quantized at a time: temporaries stay in the cache
_SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes' bound, so that no block divides by zero

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def quantize_nf4(weights: torch.Tensor, num_threads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 codes and absmax of a flat tensor in blocks of 64 weights (QLoRA, arXiv 2305.14314).

    Args:
        weights: [n], fp32, fp16 or bf16, on the CPU. A last block may be shorter; a block with NaN or infinite values
            has codes without a meaning.
        num_threads: chunks that are quantized at a time; the result does not depend on it.

    Returns:
        codes: [ceil(n / 2)] uint8, two per byte, the first weight in the high bits.
        absmax: [ceil(n / 64)] fp32.
    """
    assert weights.device.type == "cpu" and weights.dim() == 1, (weights.device, weights.shape)
    with ThreadPoolExecutor(num_threads) as pool:
        codes, absmax = zip(*pool.map(_quantize_chunk, weights.split(_CHUNK)), strict=True)
    return torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(absmax))


def _quantize_chunk(chunk: torch.Tensor) -> tuple[Codes, Floats]:
    weights = chunk.float().numpy()
    full = len(weights) // BLOCK * BLOCK
    blocks = weights[:full].reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = np.empty(len(weights) + len(weights) % 2, np.float32)  # two codes per byte
    with np.errstate(invalid="ignore"):  # infinite values are reported by whoever reads them
        np.multiply(blocks, (1 / np.maximum(absmax, _SMALLEST_ABSMAX))[:, None], out=scaled[:full].reshape(-1, BLOCK))
        if full < len(weights):  # bitsandbytes divides here, which rounds otherwise, and stores the bounded absmax
            last = np.maximum(np.abs(weights[full:]).max(), _SMALLEST_ABSMAX)
            absmax = np.append(absmax, last)
            scaled[full : len(weights)] = weights[full:] / last
            scaled[len(weights) :] = 0
    return _pack(np.clip(scaled, -1, 1, out=scaled)), absmax


def _pack(scaled: Floats) -> Codes:
    """Codes of weights in [-1, 1], two per byte."""
    codes, is_above = np.zeros(len(scaled), np.uint8), np.empty(len(scaled), np.bool_)
    for midpoint in _midpoints():
        np.greater(scaled, midpoint, out=is_above)
        np.add(codes, is_above.view(np.uint8), out=codes)
    packed: Codes = codes[::2] << np.uint8(4) | codes[1::2]
    return packed


@lru_cache
def _midpoints() -> Floats:
    """The 15 borders between neighbouring NF4 values, ascending."""
    values = bnb.get_4bit_type("nf4", device="cpu").numpy()
    midpoints: Floats = (values[:-1] + values[1:]) / np.float32(2)
    return midpoints
