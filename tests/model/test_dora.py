"""DoRA beside a sharded or quantized base against PEFT's own DoRA on plain matrices with the same values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters
from qvtune.model.dora import DoraLinear
from qvtune.model.loader import load_whole
from qvtune.model.nf4 import NF4Linear, quantize_shard
from qvtune.model.shard import Whole

IN, OUT, RANK = 53, 37, 5
WHOLE = Whole(torch.device("cpu"))


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.proj = layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        output: torch.Tensor = self.proj(x)
        return output


def plain_layer(*, bias: bool) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, bias=bias)


def nf4_layer(plain: nn.Linear) -> NF4Linear:
    """The layer with its matrix in 4 bits."""
    layer = NF4Linear(IN, OUT, bias=plain.bias is not None, double_quant=True, dtype=torch.float32)
    flat = plain.weight.detach().flatten()
    pieces, layer.offset = quantize_shard(lambda start, end: flat[start:end], layer.layout, WHOLE)
    for name, numel in layer.layout.piece_numel().items():
        setattr(layer, name, WHOLE.parameter((numel,), pieces[name]))
    if plain.bias is not None:
        layer.bias = nn.Parameter(plain.bias.detach().clone())
    return layer


def with_dora(layer: nn.Linear, *, ours: bool, dropout: float = 0.0) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=12, lora_dropout=dropout, target_modules=["proj"], use_dora=True)
    if ours:
        config._register_custom_module({nn.Linear: DoraLinear})
    torch.manual_seed(2)
    return get_peft_model(OneLayer(layer), config, autocast_adapter_dtype=False)


def move(model: Any) -> None:
    """Away from where training starts."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def outputs_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(4), requires_grad=True)
    torch.manual_seed(5)  # of the dropout
    output = model(x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(6)))
    assert x.grad is not None
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert len(trained) == 3
    return {"output": output.detach(), "x": x.grad, **trained}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_computes_what_peft_computes(bias: bool, quantized: bool, dropout: float) -> None:
    """Outputs and all gradients, at the start and after every parameter has moved."""
    layer = plain_layer(bias=bias)
    ours = with_dora(nf4_layer(layer) if quantized else layer, ours=True, dropout=dropout)
    reference = plain_layer(bias=bias)
    if quantized:
        reference.weight.data = nf4_layer(layer).matrix()
    theirs = with_dora(reference, ours=False, dropout=dropout)
    for _ in range(2):
        torch.testing.assert_close(outputs_and_gradients(ours), outputs_and_gradients(theirs), rtol=1e-5, atol=1e-5)
        for model in (ours, theirs):
            model.zero_grad()
            move(model)
    names = [[name for name, _ in model.named_parameters() if "lora" in name] for model in (ours, theirs)]
    assert names[0] == names[1]


def test_training_starts_at_the_base() -> None:
    layer = plain_layer(bias=True)
    model, x = with_dora(layer, ours=True), torch.randn(3, IN)
    assert torch.equal(model.base_model.proj.lora_magnitude_vector["default"].weight, layer.weight.norm(dim=1))
    torch.testing.assert_close(model(x), layer(x), rtol=0, atol=1e-6)


def test_in_16_bits_it_is_as_exact_as_peft() -> None:
    """Both against the same values in float32: the norms and the scale are computed in float32 here."""
    models = [with_dora(plain_layer(bias=True).to(torch.bfloat16), ours=ours) for ours in (True, False)]
    exact = with_dora(plain_layer(bias=True), ours=False)
    for model in models:
        move(model)
    exact.load_state_dict({name: value.float() for name, value in models[1].state_dict().items()})
    models[0].load_state_dict(models[1].state_dict())
    x = torch.randn(40, IN).to(torch.bfloat16)
    errors = [(model(x).float() - exact(x.float())).norm().item() for model in models]
    assert models[0](x).dtype == torch.bfloat16
    assert 0 < errors[0] < 1.1 * errors[1]


def test_the_base_is_used_once() -> None:
    """One call of the base layer is one gather and one dequantization, with dropout too."""
    layer = nf4_layer(plain_layer(bias=False))
    model = with_dora(layer, ours=True, dropout=0.5)
    calls = []
    layer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    model(torch.randn(2, 7, IN))
    assert calls == [2 * 2 * 7 + RANK + 1]


def test_the_norms_come_from_one_matrix_at_a_time(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered for them is a matrix with its statistics, and is released before the next one."""
    seen: list[set[str]] = []
    open_now = 0

    @contextmanager
    def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        nonlocal open_now
        open_now += 1
        assert open_now == 1
        seen.append({names[parameter] for parameter in parameters})
        yield
        open_now -= 1

    base = load_whole(llama_folder, ModelSection(), torch.float32)
    names = {parameter: name for name, parameter in base.named_parameters()}
    monkeypatch.setattr("qvtune.model.dora.gathered", gathered)
    add_adapters(base, AdapterSection(method="dora"), "base", seed=0)
    paths = [f"model.layers.{layer}.self_attn.{letter}_proj" for layer in (0, 1) for letter in "qv"]
    pieces = ("weight", "absmax", "nested_absmax")
    assert sorted(map(sorted, seen)) == sorted(sorted(f"{path}.{piece}" for piece in pieces) for path in paths)


def test_a_row_of_zeros_is_refused() -> None:
    layer = plain_layer(bias=False)
    layer.weight.data[11] = 0
    with pytest.raises(UserError, match=r"row 11 of a trained \[37, 53\] matrix of the base is zero"):
        with_dora(layer, ours=True)
