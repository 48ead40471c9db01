"""Sharded NF4 against bitsandbytes on the whole matrix, bit for bit."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvtune.model.nf4 import Layout, NF4Linear, dequantize_range, quantize_shard
from qvtune.model.shard import Shard
from tests.model.one_of_many import Alone

# One weight; less than a block; not a multiple of a block; even; several nested blocks, the last one short.
SHAPES = [(1, 1), (1, 5), (7, 9), (33, 65), (64, 64), (301, 203)]
CPU = torch.device("cpu")
Piece = tuple[dict[str, torch.Tensor], torch.Tensor]


class _Gathering(Exception):
    """A rank has reached the collective."""


def quantize_on_all_ranks(
    matrix: torch.Tensor, layout: Layout, num_ranks: int, reads: list[tuple[int, int]] | None = None
) -> list[Piece]:
    """``quantize_shard`` of every rank, each run first up to the collective for what it contributes."""
    flat = matrix.flatten()
    contributed: list[torch.Tensor] = []

    def read(start: int, end: int) -> torch.Tensor:
        if reads is not None:
            reads.append((start, end))
        return flat[start:end]

    class Contributing(Alone):
        def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
            contributed.append(own.clone())
            raise _Gathering

    class Gathered(Alone):
        def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
            return contributed

    shards = Shard(0, num_ranks).peers()
    for shard in shards:
        with suppress(_Gathering):
            quantize_shard(lambda start, end: flat[start:end], layout, Contributing(shard))
    assert len(contributed) == num_ranks
    assert len({part.shape for part in contributed}) == 1, "all_gather needs equal shapes"
    return [quantize_shard(read, layout, Gathered(shard)) for shard in shards]


def joined_bytes(pieces: list[Piece], layout: Layout) -> dict[str, torch.Tensor]:
    """The ranks' pieces one after the other, as bytes, without the padding."""
    return {
        name: torch.cat([piece[name].view(torch.uint8) for piece, _ in pieces])[:size]
        for name, size in layout.piece_bytes().items()
    }


def random_matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_joined_shards_equal_bitsandbytes(
    shape: tuple[int, int], num_ranks: int, double_quant: bool, storage: torch.dtype
) -> None:
    matrix = random_matrix(shape)
    layout = Layout(shape, double_quant, storage)
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double_quant, quant_type="nf4")

    pieces = quantize_on_all_ranks(matrix, layout, num_ranks)

    joined = joined_bytes(pieces, layout)
    assert torch.equal(joined["weight"], codes.view(-1))
    assert torch.equal(joined["absmax"], state.absmax.view(torch.uint8))
    if double_quant:
        assert torch.equal(joined["nested_absmax"], state.state2.absmax.view(torch.uint8))
        assert all(torch.equal(offset, state.offset) for _, offset in pieces)
    else:
        assert joined.keys() == {"weight", "absmax"}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_every_rank_stores_what_zero3_would_give_it(storage: torch.dtype) -> None:
    layout = Layout((33, 65), double_quant=True, storage=storage)
    for pieces, _ in quantize_on_all_ranks(random_matrix((33, 65)), layout, num_ranks=3):
        for name, piece in pieces.items():
            assert piece.dtype == storage and piece.dim() == 1
            assert piece.numel() == Shard(0, 3).numel(layout.piece_numel()[name])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_reads_its_share_and_at_most_two_blocks_more(shape: tuple[int, int], num_ranks: int) -> None:
    layout = Layout(shape, double_quant=True, storage=torch.float32)
    reads: list[tuple[int, int]] = []
    quantize_on_all_ranks(random_matrix(shape), layout, num_ranks, reads)
    assert 1 <= len(reads) <= num_ranks, "one read a rank, none for a rank without a share"
    share = Shard(0, num_ranks).numel(layout.piece_numel()["weight"]) * 4 * 2  # elements of 4 bytes, 2 weights a byte
    assert all(0 <= start < end <= shape[0] * shape[1] for start, end in reads)
    assert max(end - start for start, end in reads) <= share + 2 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_stored_precisions_in_several_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvtune.model.nf4._CHUNK", 4 * 64)
    matrix, layout = random_matrix((33, 65), dtype), Layout((33, 65), False, torch.float32)
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    joined = joined_bytes(quantize_on_all_ranks(matrix, layout, 2), layout)
    assert torch.equal(joined["weight"], codes.view(-1))
    assert torch.equal(joined["absmax"].view(torch.float32), state.absmax)


def test_the_offset_does_not_depend_on_the_number_of_threads() -> None:
    """torch splits sums of more than 32,768 numbers among its threads; the last bit of the mean can differ."""
    shape = (2048, 2100)
    matrix, layout = random_matrix(shape), Layout(shape, True, torch.float32)
    offsets = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)  # put back by the fixture of all tests
        offsets.append(quantize_on_all_ranks(matrix, layout, num_ranks=1)[0][1])
    assert torch.equal(*offsets)


class QuantizationDevices(TorchDispatchMode):
    """Notes the devices of all tensors that reach a kernel of bitsandbytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bitsandbytes":
            self.seen |= {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_device_computes_no_codes(double_quant: bool) -> None:
    """The meta device stands for a GPU, whose kernels would give other bytes."""
    matrix, layout = random_matrix((301, 203)), Layout((301, 203), double_quant, torch.float32)
    ((expected, expected_offset),) = quantize_on_all_ranks(matrix, layout, num_ranks=1)
    with QuantizationDevices() as devices:
        placement = Alone(Shard(), torch.device("meta"))
        pieces, offset = quantize_shard(lambda start, end: matrix.flatten()[start:end], layout, placement)
    assert devices.seen == ({"cpu"} if double_quant else set())
    assert torch.equal(offset, expected_offset)
    assert {name: piece.numpy().tobytes() for name, piece in pieces.items()} == {
        name: piece.numpy().tobytes() for name, piece in expected.items()
    }


def quantized_linear(weight: torch.Tensor, bias: torch.Tensor | None, double_quant: bool) -> NF4Linear:
    """An NF4Linear of one rank that computes in ``weight``'s dtype."""
    linear = NF4Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, double_quant=double_quant, dtype=weight.dtype
    )
    ((pieces, offset),) = quantize_on_all_ranks(weight, linear.layout, num_ranks=1)
    for name, piece in pieces.items():
        setattr(linear, name, nn.Parameter(piece, requires_grad=False))
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    linear.offset = offset
    return linear


def output_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = hidden_states.clone().requires_grad_()
    output = function(leaf)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    output.backward(weights)
    assert leaf.grad is not None
    return output.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(33, 66), (64, 48)])  # odd rows would be compiled for many seconds by bitsandbytes
def test_linear_equals_bitsandbytes_matmul(
    shape: tuple[int, int], with_bias: bool, double_quant: bool, dtype: torch.dtype
) -> None:
    weight = random_matrix(shape, dtype)
    bias = torch.linspace(-1, 1, shape[0]).to(dtype) if with_bias else None
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    hidden_states = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)

    actual = output_and_gradient(quantized_linear(weight, bias, double_quant), hidden_states)

    peer = output_and_gradient(lambda x: bitsandbytes.matmul_4bit(x, codes.t(), state, bias=bias), hidden_states)
    torch.testing.assert_close(actual, peer, rtol=0, atol=0)  # of so few rows torch computes both products
    dense = bnb.dequantize_4bit(codes, state)
    plain = output_and_gradient(lambda x: nn.functional.linear(x, dense, bias), hidden_states)
    # bf16 keeps 8 bits; the kernels for a transposed matrix may sum in another order.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, plain, rtol=tolerance, atol=tolerance)


def test_dequantized_is_what_bitsandbytes_dequantizes() -> None:
    weight = random_matrix((301, 204), torch.float32)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(quantized_linear(weight, None, True).matrix(), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_range_is_a_cut_of_the_whole(double_quant: bool, dtype: torch.dtype) -> None:
    """Within, at and across the borders of nested blocks (16,384 weights), of which the matrix has four."""
    weight = random_matrix((301, 204), dtype)
    layout, total = Layout((301, 204), double_quant, dtype), weight.numel()
    ((pieces, offset),) = quantize_on_all_ranks(weight, layout, num_ranks=1)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    whole = bnb.dequantize_4bit(codes, state).flatten()
    unit = 64 * 256
    ranges = (
        (0, total),
        (5, 17),
        (unit - 1, unit + 1),
        (unit, 2 * unit),
        (unit + 64, 3 * unit + 1),
        (total - 3, total),
    )
    for start, end in ranges:
        assert torch.equal(dequantize_range(pieces, offset, layout, start, end), whole[start:end]), (start, end)


def test_autograd_keeps_no_tensor() -> None:
    """What forward sees is gathered storage that ZeRO-3 frees: a saved tensor would be garbage in backward."""
    linear = quantized_linear(random_matrix((33, 66), torch.float32), torch.zeros(33), double_quant=True)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    hidden_states = torch.randn(2, 66, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = linear(hidden_states)
    assert saved == []
    assert vars(output.grad_fn) == {"module": linear}, "nor the dequantized matrix, which would be the whole base"
    output.sum().backward()
    assert hidden_states.grad is not None


def test_backward_uses_the_parameters_of_that_moment() -> None:
    """ZeRO-3 gathers into new storage for backward."""
    linear = quantized_linear(random_matrix((64, 64), torch.float32), None, double_quant=True)
    hidden_states = torch.randn(2, 64, requires_grad=True)
    output = linear(hidden_states)
    codes = linear.weight.data
    linear.weight.data = torch.empty(0)
    linear.weight.data = codes.clone()
    codes.zero_()
    output.sum().backward()
    torch.testing.assert_close(hidden_states.grad, linear.matrix().sum(0).expand(2, 64), rtol=1e-5, atol=1e-5)


def test_everything_of_a_linear_is_frozen_and_of_one_dtype() -> None:
    linear = NF4Linear(65, 33, bias=True, double_quant=True, dtype=torch.bfloat16)
    parameters = dict(linear.named_parameters())
    assert parameters.keys() == {"weight", "absmax", "nested_absmax", "bias"}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    assert not any(parameters[name].requires_grad for name in ("weight", "absmax", "nested_absmax"))
    assert "33" in repr(linear) and "nf4" in repr(linear)
