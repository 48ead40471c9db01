"""Bit by bit what bitsandbytes' CPU code gives, for all kinds of blocks and dtypes."""

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

from qvtune.model import quantizer
from qvtune.model.quantizer import BLOCK, quantize_nf4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def blocks_of(kind: str) -> torch.Tensor:
    """Several blocks in fp32, the last one shorter."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9 * BLOCK + 17, generator=generator)
    midpoints = _get_4bit_quantize_bounds("nf4", torch.device("cpu"))[0]
    return {
        "random": values * 0.02,
        "constant": torch.full_like(values, 0.37),
        "zero": torch.zeros_like(values),
        "zero_and_random": torch.cat([torch.zeros(BLOCK), values, torch.zeros(5)]),
        "denormal": values * 1e-39,
        "just_above_denormal": values * 1e-37,
        "huge": values.clamp(-3, 3) * 1e38,
        "on_the_midpoints": torch.cat([torch.ones(1), midpoints, -torch.ones(BLOCK - 16)]).repeat(3),
        "one_weight": values[:1],
        "odd": values[: BLOCK + 1],
        "empty": values[:0],
    }[kind]


KINDS = (
    *("random", "constant", "zero", "zero_and_random", "denormal", "just_above_denormal", "huge", "on_the_midpoints"),
    *("one_weight", "odd"),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_that_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    weights = blocks_of(kind).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    codes, absmax = quantize_nf4(weights)
    expected, state = bnb.quantize_4bit(weights.float(), blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes, expected.view(-1))
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_chunks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    weights = blocks_of("random")
    expected = quantize_nf4(weights)
    monkeypatch.setattr(quantizer, "_CHUNK", 2 * BLOCK)
    found = quantize_nf4(weights, num_threads)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_nothing_gives_nothing() -> None:
    codes, absmax = quantize_nf4(blocks_of("empty"))
    assert (codes.dtype, len(codes), absmax.dtype, len(absmax)) == (torch.uint8, 0, torch.float32, 0)


def test_the_midpoints_are_those_of_bitsandbytes() -> None:
    bounds, _ = _get_4bit_quantize_bounds("nf4", torch.device("cpu"))
    assert torch.equal(torch.from_numpy(quantizer._midpoints()), bounds)


def test_a_tensor_on_a_device_is_refused() -> None:
    with pytest.raises(AssertionError):
        quantize_nf4(torch.empty(BLOCK, device="meta"))
