"""What is gathered of a decoder layer, how often, and what is not."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import nvtx
from torch.utils._python_dispatch import TorchDispatchMode

from qvtune.config.adapter import AdapterSection
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.distributed.fake_ranks import fake_ranks, gathered_bytes
from qvtune.model.adapters import add_adapters
from qvtune.model.gather import JointParameter
from qvtune.model.layers import decoder_layers, layer_sizes
from qvtune.model.shard import gathered, release_gathered
from qvtune.model.skeleton import build_skeleton, read_model_config
from tests.plan.shapes import make_config_folder
from tests.support.fake_engine import run_of, small_batch, small_model, start_engine

NUM_RANKS = 4


class Gathers(TorchDispatchMode):
    """Counts collectives that gather, and their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.num_bytes = 0, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = gathered_bytes(func, args)
        self.number += bool(found)
        self.num_bytes.update(found)
        return func(*args, **(kwargs or {}))


def micro_batch(engine: Any) -> Gathers:
    """What a forward and a backward gather."""
    with Gathers() as gathers:
        engine.backward(engine(small_batch()))
    return gathers


def gathered_bytes_of_a_layer(run: RunConfig) -> int:
    return layer_sizes(small_model(run, 1, torch.float32, None)).gathered_numel * torch.float32.itemsize


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_gathered_twice_in_one_collective_each(checkpointing: bool) -> None:
    """Embedding and head as often as before, however many layers there are."""
    found = {}
    for num_layers in (2, 5):
        run = run_of(NUM_RANKS, activation_checkpointing=checkpointing)
        with fake_ranks(NUM_RANKS):
            engine = start_engine(run, num_layers, NUM_RANKS, torch.float32)
            for _ in range(4):
                gathers = micro_batch(engine)
        found[num_layers] = gathers
        layer = gathered_bytes_of_a_layer(run)
    assert found[5].number - found[2].number == 2 * 3
    assert found[5].num_bytes.total() - found[2].num_bytes.total() == pytest.approx(2 * 3 * layer, rel=1e-3)


def test_the_embedding_is_not_gathered_for_backward() -> None:
    """Its output requires a gradient, for the first layer's sake, and has nothing to compute from it."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        embedding = engine.module.model.get_base_model().get_input_embeddings()
        for _ in range(3):
            loss = engine(small_batch())
            engine.backward(loss)
        assert embedding.weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
        assert not engine.optimizer.parameter_offload.get_param_coordinator().is_invalid_trace()
        with Gathers() as gathers:
            engine.backward(engine(small_batch()))
        ends = gathers.num_bytes.total() - 2 * 2 * gathered_bytes_of_a_layer(run_of(NUM_RANKS))
    assert ends == pytest.approx(2 * 256 * 128 * 4, rel=0.02)  # the embedding and the head, in forward


def test_small_parameters_stay_and_come_back() -> None:
    """``empty_partition_cache`` releases them, too: a save or a generation does that."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        small = engine.optimizer.persistent_parameters
        micro_batch(engine)
        engine.step()
        assert len(small) > 20
        assert {parameter.ds_status for parameter in small} == {ZeroParamStatus.AVAILABLE}
        assert not any(parameter.ds_persist for parameter in decoder_layers(engine.module)[0]._qvtune_gathered)
        engine.empty_partition_cache()
        assert {parameter.ds_status for parameter in small} == {ZeroParamStatus.NOT_AVAILABLE}
        micro_batch(engine)
        assert {parameter.ds_status for parameter in small} == {ZeroParamStatus.AVAILABLE}


def test_the_frozen_parameters_of_a_layer_are_one_for_the_coordinator() -> None:
    """What a rank keeps of them is one tensor, of which each has its part."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        layer: Any = decoder_layers(engine.module)[0]
        joint, *others = layer._qvtune_gathered
        assert isinstance(joint, JointParameter)
        assert not any(isinstance(one, JointParameter) or not one.requires_grad for one in others)
        frozen = {id(one) for one in layer.parameters() if not one.requires_grad and not one.ds_persist}
        assert {id(one) for one in joint.parameters} == frozen
        pieces = [one.ds_tensor for one in joint.parameters]
        assert {piece.untyped_storage().data_ptr() for piece in pieces} == {
            joint.ds_tensor.untyped_storage().data_ptr()
        }
        assert sum(piece.numel() for piece in pieces) == joint.ds_tensor.numel() == joint.partition_numel()
        before = [piece.clone() for piece in pieces]
        for _ in range(3):
            micro_batch(engine)
        assert all(torch.equal(one, piece) for one, piece in zip(before, pieces, strict=True))


def test_what_is_gathered_ahead_is_released() -> None:
    """A forward alone gathers for the backward that does not come, as an evaluation does."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 3, NUM_RANKS, torch.float32)
        expected = [micro_batch(engine).number for _ in range(4)][-1]
        engine(small_batch())
        parameters: list[Any] = list(engine.module.parameters())
        assert any(one.ds_status is not ZeroParamStatus.NOT_AVAILABLE for one in parameters if not one.ds_persist)
        release_gathered(engine)
        assert {one.ds_status for one in parameters} == {ZeroParamStatus.NOT_AVAILABLE}
        micro_batch(engine)  # which gathers the small ones again
        assert micro_batch(engine).number == expected


def test_all_that_was_gathered_together_is_released_together() -> None:
    """As a generation gathers the parameters of a module. Trained ones may be among them, first or last."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        layer: Any = decoder_layers(engine.module)[0]
        parameters = [one for one in layer.parameters() if not one.ds_persist]
        for order in (parameters, parameters[::-1]):
            with gathered(order):
                assert {one.ds_status for one in parameters} == {ZeroParamStatus.AVAILABLE}
            assert {one.ds_status for one in parameters} == {ZeroParamStatus.NOT_AVAILABLE}
        micro_batch(engine)


def test_modules_in_layers_are_not_walked_through_in_every_micro_batch() -> None:
    """The others are told that a forward runs, and that it has ended; an error leaves the model as it was."""
    with fake_ranks(NUM_RANKS):
        engine = start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        embedding = engine.module.model.get_base_model().get_input_embeddings()
        seen: list[bool] = []
        embedding.register_forward_hook(lambda *_: seen.append(embedding._parameters._in_forward))
        modules = set(engine.module.modules())
        micro_batch(engine)
        assert seen == [True] and not embedding._parameters._in_forward
        embedding.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine(small_batch())
        assert set(engine.module.modules()) == modules
        with WalkedThrough(engine.module) as walked:
            engine._forward_prologue((), {})
            engine._forward_epilogue()
        assert walked.inside == 0


class WalkedThrough:
    """How often ``named_modules`` of a decoder layer is asked."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.layer, self.inside = decoder_layers(module)[0], 0

    def __enter__(self) -> "WalkedThrough":
        def named_modules(*arguments: Any, **keywords: Any) -> Any:
            self.inside += 1
            return type(self.layer).named_modules(self.layer, *arguments, **keywords)

        vars(self.layer)["named_modules"] = named_modules
        return self

    def __exit__(self, *_: object) -> None:
        del vars(self.layer)["named_modules"]


def test_ranges_are_recorded_for_nsight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvtx, "enable_nvtx", nvtx.enable_nvtx)  # engines set it; as it was afterwards
    with fake_ranks(NUM_RANKS):
        start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        assert not nvtx.enable_nvtx
        monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
        start_engine(run_of(NUM_RANKS), 2, NUM_RANKS, torch.float32)
        assert nvtx.enable_nvtx


@pytest.mark.parametrize(
    ("shapes", "adapter", "persistent"),
    [
        ("llama3_8b", {"rank": 16}, 16 * 4096),  # the factors; with them the scales of k and v
        ("llama3_70b", {"rank": 16}, 16 * 8192),
        ("llama3_8b", {"method": "full"}, 7168),  # norms, and the fp32 scales of scales of the largest matrix
        ("llama3_8b", {"rank": 1024}, 1024 * 1024),  # the larger factors are more than an eighth of a layer
    ],
)
def test_what_stays_whole_is_small(tmp_path: Path, shapes: str, adapter: dict[str, Any], persistent: int) -> None:
    section = ModelSection()
    config = read_model_config(make_config_folder(tmp_path / "model", shapes), section)
    config.num_hidden_layers = 2
    trained = ("q_proj", "v_proj") if adapter.get("method") == "full" else ()
    skeleton = build_skeleton(config, section, torch.bfloat16, "sdpa", trained=trained)
    sizes = layer_sizes(add_adapters(skeleton, AdapterSection.model_validate(adapter), "base", seed=0))
    layer = [parameter.numel() for parameter in decoder_layers(skeleton)[0].parameters()]
    kept = sum(numel for numel in layer if numel <= sizes.persistent_numel)
    assert sizes.classes == ("LlamaDecoderLayer",)
    assert sizes.persistent_numel == persistent
    assert sizes.gathered_numel == sum(layer) - kept
    assert kept <= sum(layer) / 8
