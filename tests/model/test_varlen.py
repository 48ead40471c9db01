"""Attention without a mask: torch's kernel, as far as it is Python, and one document after another on the CPU.

That a whole model computes the same with it as with sdpa: tests/tasks/test_causal_lm.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from qvtune.model import varlen
from qvtune.model.varlen import varlen_attention
from tests.support.flash_kernel import Calls, flash_kernel_on_cpu
from tests.support.varlen_attention import VarlenAttention

ROWS, LENGTH = 2, 24
BORDERS = torch.tensor([0, 5, 6, 20, 24, 41, 48], dtype=torch.int32)  # of two rows; one document has one token
LONGEST = 17
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Module(NamedTuple):
    """As much of an attention layer as an implementation looks at."""

    is_causal: bool


@pytest.fixture(params=["one by one", "kernel"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    if request.param == "one by one":
        yield Calls()
        return
    monkeypatch.setattr(varlen, "_WITHOUT_KERNEL", ())
    with flash_kernel_on_cpu() as calls:
        yield calls
        assert calls.num_forward > 0


def output_and_gradients(attention: Any, head_size: int, kv_heads: int, is_causal: bool, **options: Any) -> Tensors:
    torch.manual_seed(0)
    shapes = ((ROWS, heads, LENGTH, head_size) for heads in (4, kv_heads, kv_heads))
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output = attention(
        Module(is_causal),
        *states,
        None,
        scaling=0.3,
        cu_seq_lens_q=BORDERS,
        cu_seq_lens_k=BORDERS,
        max_length_q=LONGEST,
        max_length_k=LONGEST,
        dropout=0.0,
        **options,
    )
    (output * torch.randn(output.shape)).sum().backward()
    query, key, value = (one.grad for one in states)
    assert query is not None and key is not None and value is not None
    return output.detach(), query, key, value


@pytest.mark.parametrize(
    ("head_size", "kv_heads", "is_causal", "window"),
    [(16, 2, True, None), (16, 4, True, None), (16, 2, False, None), (22, 1, True, None), (16, 2, True, 3)],
)
def test_it_is_attention_within_documents(
    calls: Calls, head_size: int, kv_heads: int, is_causal: bool, window: int | None
) -> None:
    """Heads of 22, which the kernel cannot have; a window shorter than most documents."""
    reference = VarlenAttention()
    expected = output_and_gradients(
        lambda *states, **options: reference(*states, **options)[0],
        head_size,
        kv_heads,
        is_causal,
        sliding_window=window,
    )
    found = output_and_gradients(varlen_attention, head_size, kv_heads, is_causal, sliding_window=window)
    assert found[0].shape == (ROWS, LENGTH, 4, head_size)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_alone_is_deterministic_on_request(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """Other operations may have no deterministic kernel: torch would refuse them."""
    monkeypatch.setattr(varlen, "_WITHOUT_KERNEL", ())
    seen: list[bool] = []

    def attention(*states: Any, **options: Any) -> torch.Tensor:
        output = varlen_attention(*states, deterministic=deterministic, **options)
        output.register_hook(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
        return output

    with flash_kernel_on_cpu() as calls:
        output_and_gradients(attention, 16, 2, True)
    assert calls.deterministic == [deterministic]
    assert seen == [False] and not torch.are_deterministic_algorithms_enabled()


def test_without_gradients(calls: Calls) -> None:
    states = [torch.randn(ROWS, heads, LENGTH, 16) for heads in (4, 2, 2)]
    options = {"scaling": 0.3, "cu_seq_lens_q": BORDERS, "max_length_q": LONGEST}
    assert not varlen_attention(Module(True), *states, None, **options).requires_grad  # type: ignore[arg-type]
