"""Products with frozen matrices against float64, and by which library they are computed."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvtune.model.linear import FrozenLinear, linear


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "inputs",
    [
        random(66),
        random(0, 66),
        random(2, 3, 66),
        random(2, 32, 66),
        random(3, 11, 66),
        random(66, 70).T,
        random(1, 66).expand(40, 66),
    ],
)
def test_equals_the_product_in_float64(inputs: torch.Tensor, transposed: bool, with_bias: bool) -> None:
    """Of one vector, of none, of few and of many rows; of tensors that are not contiguous, as backward has them."""
    weight = random(66, 33).T if transposed else random(33, 66)
    bias = random(33) if with_bias else None
    exact = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(linear(inputs, weight, bias), exact.float(), rtol=1e-5, atol=1e-5)


class Operations(TorchDispatchMode):
    """Names of the operations that are called, and the shapes of their first arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.called.append((str(func), getattr(args[0], "shape", torch.Size())))
        return func(*args, **kwargs or {})

    def rows_for_onednn(self) -> set[int]:
        """Rows of the inputs of its operation."""
        return {shape[0] for name, shape in self.called if name == "mkldnn._linear_pointwise.default"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch comes without oneDNN")
@pytest.mark.parametrize(
    ("dtype", "device", "by_onednn"),
    [(torch.float32, "cpu", True), (torch.bfloat16, "cpu", False), (torch.float32, "meta", False)],
)
def test_onednn_computes_float32_on_a_cpu(dtype: torch.dtype, device: str, by_onednn: bool) -> None:
    inputs, weight = random(64, 8, dtype=dtype).to(device), random(4, 8, dtype=dtype).to(device)
    with Operations() as operations:
        linear(inputs, weight)
    assert bool(operations.rows_for_onednn()) == by_onednn
    assert operations.called


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch comes without oneDNN")
def test_onednn_sees_few_numbers_of_rows() -> None:
    """It keeps code for each; a run has rows of many lengths, and as many numbers of labels."""
    weight = random(4, 8)
    with Operations() as operations:
        shapes = {linear(random(rows, 8), weight).shape for rows in range(150)}
    assert shapes == {(rows, 4) for rows in range(150)}
    assert operations.rows_for_onednn() == {32, 64, 96, 128, 160}


def test_a_build_of_torch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inputs, weight = random(64, 8), random(3, 8)
    assert torch.equal(linear(inputs, weight), nn.functional.linear(inputs, weight))


def frozen(plain: nn.Linear) -> FrozenLinear:
    """With the parameters of ``plain``, not trained."""
    layer = FrozenLinear(plain.in_features, plain.out_features, bias=plain.bias is not None)
    layer.load_state_dict(plain.state_dict())
    layer.requires_grad_(False)
    return layer


@pytest.mark.parametrize("train_bias", [True, False, None])
def test_a_frozen_layer_equals_a_plain_one(train_bias: bool | None) -> None:
    """Output, gradient of the input and, where it is trained, of the bias."""
    plain = nn.Linear(66, 33, bias=train_bias is not None).requires_grad_(False)
    layer = frozen(plain)
    if train_bias:
        plain.bias.requires_grad_()
        layer.bias.requires_grad_()
    inputs, expected_inputs = (random(2, 3, 66).requires_grad_() for _ in range(2))
    output, expected = layer(inputs), plain(expected_inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(inputs.grad, expected_inputs.grad, rtol=1e-5, atol=1e-5)
    if train_bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-5)


def test_backward_takes_the_matrix_of_that_moment_and_autograd_keeps_none() -> None:
    """ZeRO-3 frees what forward has seen and gathers into new memory for backward."""
    layer = frozen(nn.Linear(8, 4))
    saved: list[torch.Tensor] = []
    inputs = random(2, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(inputs)
    assert saved == []
    layer.weight.data = gathered_again = random(4, 8)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, gathered_again.sum(0).expand(2, 8), rtol=1e-5, atol=1e-5)
