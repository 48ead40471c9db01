"""The hooks of a decoder layer beside those of DeepSpeed, which they replace."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qvtune.distributed.fake_ranks import fake_ranks
from qvtune.model import layers as layers_module
from qvtune.model.layers import decoder_layers
from tests.support import fake_engine
from tests.support.fake_engine import run_of, small_batch, start_engine

NUM_LAYERS = 3


def engine_with_values(checkpointing: bool) -> Any:
    """On one rank, whose collectives are complete. Any bytes are codes of NF4."""
    engine = start_engine(run_of(1, activation_checkpointing=checkpointing), NUM_LAYERS, 1, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.module.parameters():
        parameter.ds_tensor.normal_(std=0.1, generator=generator)
    return engine


@pytest.fixture(params=["kept", "recomputed inside", "recomputed around"])
def checkpointing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Of activations; transformers recomputes what is inside of a layer, other code may call the layer once more."""
    if request.param == "recomputed around":
        call = torch.nn.Module.__call__

        def recomputed(layer: Any, *inputs: Any, **options: Any) -> Any:
            return checkpoint(partial(call, layer, **options), *inputs, use_reentrant=False)

        monkeypatch.setattr(LlamaDecoderLayer, "__call__", recomputed)
    return request.param == "recomputed inside"


def gradients_after(engine: Any, num_micro_batches: int) -> list[torch.Tensor]:
    for _ in range(num_micro_batches):
        engine.backward(engine(small_batch()))
    return [gradient.clone() for group in engine.optimizer.averaged_gradients.values() for gradient in group]


def test_gradients_are_those_of_deepspeeds_hooks(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """Bit for bit, in the first micro-batch, in which DeepSpeed records the modules, and later."""
    with fake_ranks(1):
        found = gradients_after(engine_with_values(checkpointing), 3)
    with monkeypatch.context() as context, fake_ranks(1):
        context.setattr(layers_module, "shorten_hooks", lambda *_: None)
        engine = engine_with_values(checkpointing)
        assert decoder_layers(engine.module)[0]._backward_hooks
        expected = gradients_after(engine, 3)
    assert len(found) == len(expected) == NUM_LAYERS * 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(one.isfinite().all() and one.any() for one in found)


def test_a_layer_is_asked_for_once_in_each_direction(checkpointing: bool) -> None:
    """Also if it is recomputed; and it is released before the next one is gathered."""
    calls: list[tuple[str, int]] = []
    with fake_ranks(1):
        engine = engine_with_values(checkpointing)
        layers = decoder_layers(engine.module)
        offload = engine.optimizer.parameter_offload

        def noting(name: str, function: Callable[[Any], None]) -> Callable[[Any], None]:
            def noted(module: Any) -> None:
                if module in layers:
                    calls.append((name, layers.index(module)))
                function(module)

            return noted

        for direction in ("forward", "backward"):
            for when in ("pre", "post"):
                name = f"{when}_sub_module_{direction}_function"
                setattr(offload, name, noting(f"{when} {direction}", getattr(offload, name)))
        for _ in range(2):
            calls.clear()
            engine.backward(engine(small_batch()))
            forward = [(f"{when} forward", layer) for layer in range(NUM_LAYERS) for when in ("pre", "post")]
            backward = [(f"{when} backward", layer) for layer in range(NUM_LAYERS)[::-1] for when in ("pre", "post")]
            assert calls == forward + backward


def test_the_hooks_of_others_stay_and_a_forward_alone_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of_others: list[torch.nn.Module] = []
    hook_layers = fake_engine.hook_layers

    def hook(engine: Any) -> None:
        for layer in decoder_layers(engine.module):
            layer.register_forward_pre_hook(lambda module, _: of_others.append(module))
        hook_layers(engine)

    monkeypatch.setattr(fake_engine, "hook_layers", hook)
    with fake_ranks(1):
        engine = engine_with_values(checkpointing=False)
        layers = decoder_layers(engine.module)
        with torch.no_grad():
            engine(small_batch())
        assert of_others == layers
        for layer in layers:
            assert (len(layer._forward_pre_hooks), len(layer._forward_hooks), len(layer._backward_hooks)) == (2, 1, 0)
        gradients_after(engine, 2)
