"""Predictions against real runs, and extrapolated ones against simulations of all layers."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from transformers import LlamaConfig

from qvtune.config.deepspeed import resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.model.skeleton import read_model_config
from qvtune.plan import memory
from qvtune.plan.memory import GENERATION, Costs, costs_of
from qvtune.plan.simulate import BASE, CACHE, GATHERED, SAVED, TRAINED, Setup
from qvtune.versions import repository
from tests.plan.tracked import tracked
from tests.support.lab import Lab
from tests.support.tiny import make_model_folder

pytestmark = pytest.mark.slow
LENGTH, NUM_RANKS = 64, 2


def deepspeed_json(folder: Path, stage: str, **zero: Any) -> str:
    """A file of ds_configs/ with small buffers, which would hide everything else of a small model."""
    content = json.loads((repository() / "ds_configs" / f"{stage}.json").read_text())
    content["zero_optimization"] |= {"reduce_bucket_size": 20_000, **zero}
    path = folder / f"{stage}.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="module")
def wide_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Layers that are large against the buffers; rows that are full, of two documents."""
    lab = Lab(tmp_path_factory.mktemp("plan"))
    make_model_folder(lab.folder / "model", num_layers=4, head_dim=32, intermediate_size=1024, hidden_size=256)
    row = {"prompt": "h", "completion": "ello world " * 40}  # longer than a row of this model's tokens
    (lab.folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return lab


def config_of(lab: Lab, stage: str, *, checkpointing: bool, packing: bool) -> dict[str, Any]:
    """A run of three steps."""
    return lab.config(
        f"{stage}-{checkpointing}",
        deepspeed=deepspeed_json(lab.folder, stage),
        model={"name_or_path": str(lab.folder / "model"), "attention": "sdpa", "dtype": "float32"},
        data={"train": str(lab.folder / "train.jsonl"), "max_length": LENGTH, "packing": packing},
        train={"max_steps": 3, "global_batch_size": NUM_RANKS, "activation_checkpointing": checkpointing},
    )


def setup_of(config: dict[str, Any], num_ranks: int) -> Setup:
    run = RunConfig.model_validate(config)
    model_config = read_model_config(Path(run.model.name_or_path), run.model)
    return Setup(run, model_config, resolve_deepspeed(run, num_ranks, "float32"), torch.float32, "sdpa")


def test_predictions_are_those_of_real_runs(wide_lab: Lab) -> None:
    """The whole matrix, on the embedded model: python -m tests.benchmarks.plan."""
    # Where rows are packed, a forward pass before training (the check of the packing) makes DeepSpeed release, and so
    # gather, the last layer and the head once more than it otherwise does.
    zero3 = config_of(wide_lab, "zero3", checkpointing=True, packing=False)
    dora = {**zero3, "run_dir": f"{zero3['run_dir']}-dora", "adapter": {**zero3["adapter"], "method": "dora"}}
    configs = [zero3, config_of(wide_lab, "zero2", checkpointing=False, packing=True), dora]
    for config, steps in zip(configs, tracked(configs, NUM_RANKS, wide_lab.folder / "ranks"), strict=True):
        predicted = costs_of(setup_of(config, NUM_RANKS), NUM_RANKS)
        assert predicted.peak.total() == pytest.approx(max(step["peak"] for step in steps), rel=0.1)
        if config is not configs[1]:
            assert predicted.gathered == steps[0]["gathered"] > 0


@cache
def costs(
    stage: str,
    num_ranks: int,
    *,
    checkpointing: bool = False,
    num_layers: int = 3,
    node: int = 1,
    prompts: tuple[str, ...] = (),
    method: str = "lora",
    dtype: torch.dtype = torch.bfloat16,
    quantization: str = "nf4",
) -> Costs:
    """Of a small LLaMA; ``node``: ranks that are one, with hpZ. Cached: a simulation takes seconds."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=999,
        attention_bias=True,
    )
    zero = {"zero_hpz_partition_size": node} if node > 1 else {}
    train: dict[str, Any] = {"max_steps": 1, "global_batch_size": num_ranks, "activation_checkpointing": checkpointing}
    if prompts:
        train["generate"] = {"prompts": prompts, "max_new_tokens": 36, "batch_size": 3}
    with TemporaryDirectory() as folder:
        run = RunConfig.model_validate(
            {
                "run_dir": "run",
                "deepspeed": deepspeed_json(Path(folder), stage, **zero),
                "model": {"quantization": quantization},
                "data": {"max_length": LENGTH},
                "adapter": {"method": method},
                "train": train,
            }
        )
        deepspeed_config = resolve_deepspeed(run, num_ranks, str(dtype).removeprefix("torch."))
    return costs_of(Setup(run, config, deepspeed_config, dtype, "sdpa"), num_ranks)


def test_what_methods_need_beside_each_other() -> None:
    """DoRA at most a layer's codes more than LoRA; (IA)^3 and biases, one value for each output, less for training."""
    lora, dora, ia3, bias = (
        costs("zero3", 2, checkpointing=True, method=method) for method in ("lora", "dora", "ia3", "bias")
    )
    layer = (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 512) // 2
    assert lora.peak.total() < dora.peak.total() <= lora.peak.total() + layer
    assert bias.peak[TRAINED] == ia3.peak[TRAINED] < lora.peak[TRAINED] < dora.peak[TRAINED]


def flop_of(one: Costs) -> int:
    return sum(flop * count for (flop, _), count in one.operations.items())


def test_extrapolated_is_what_all_layers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    extrapolated = costs("zero3", 2, checkpointing=True, num_layers=6)
    monkeypatch.setattr(memory, "_DEPTHS", (5, 6))
    costs.cache_clear()
    whole = costs("zero3", 2, checkpointing=True, num_layers=6)
    assert extrapolated.num_layers == whole.num_layers == 6
    assert extrapolated.peak.total() == pytest.approx(whole.peak.total(), rel=0.01)
    assert extrapolated.gathered == pytest.approx(whole.gathered, rel=0.01)
    assert extrapolated.operations.total() == pytest.approx(whole.operations.total(), rel=0.01)
    assert flop_of(extrapolated) == flop_of(whole)


def test_costs_do_not_depend_on_the_order_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps a layer's parameters in sets, whose order is that of addresses, and asks the first to gather."""

    def costs_with(trained_first: bool) -> Costs:
        class Ordered(set[Any]):
            def __iter__(self) -> Iterator[Any]:
                def key(one: Any) -> tuple[bool, int]:
                    return getattr(one, "requires_grad", False) is not trained_first, getattr(one, "ds_id", 0)

                return iter(sorted(super().__iter__(), key=key))

        costs.cache_clear()
        monkeypatch.setattr(partitioned_param_coordinator, "set", Ordered, raising=False)
        return costs("zero3", 2, checkpointing=True)

    assert costs_with(trained_first=True) == costs_with(trained_first=False)


def test_a_shard_of_many_ranks_is_that_share_of_the_base() -> None:
    """Simulated with two ranks, corrected for all."""
    two, many, whole = costs("zero3", 2), costs("zero3", 64), costs("zero2", 2)
    assert many.peak[BASE] == pytest.approx(two.peak[BASE] / 32, rel=0.02)
    assert many.gathered == two.gathered > 0 and many.peak[SAVED] == two.peak[SAVED]
    assert whole.peak[BASE] == pytest.approx(2 * two.peak[BASE], rel=0.02)
    assert whole.gathered == whole.peak[GATHERED] == 0


def test_a_generation_has_the_whole_base_and_a_cache_on_every_rank() -> None:
    """Beside the shard; with ZeRO-2 it is there already. Per token 3 layers have keys and values of 2 heads of 32."""
    sharded, whole = costs("zero3", 64, prompts=("a",)), costs("zero2", 2, prompts=("a",))
    base = whole.peak[BASE]
    cache = 3 * (LENGTH + 36) * (3 * 2 * 32 * 2 * 2)
    assert sharded.peaks[GENERATION][GATHERED] == pytest.approx(base, rel=0.02)
    assert sharded.peaks[GENERATION][CACHE] == whole.peaks[GENERATION][CACHE] == cache
    assert whole.peaks[GENERATION][GATHERED] == 0
    assert GENERATION not in costs("zero2", 2).peaks


def test_with_hpz_the_base_is_gathered_within_the_node_and_held_twice() -> None:
    plain, hpz = costs("zero3", 64), costs("zero3_hpz", 64, node=8)
    assert hpz.gathered_in_node == pytest.approx(plain.gathered, rel=0.05)
    assert hpz.gathered < plain.gathered / 20
    whole = 64 * plain.peak[BASE]
    assert hpz.peak[BASE] == pytest.approx(whole / 64 + whole / 8, rel=0.05)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_no_more_is_gathered_at_a_time_without_checkpointing(quantization: str) -> None:
    """Autograd keeps no gathered matrix from forward to backward: of 6 layers that would be twice as much."""
    kept, recomputed = (
        costs("zero3", 4, checkpointing=checkpointing, num_layers=6, quantization=quantization)
        for checkpointing in (False, True)
    )
    assert kept.peak[GATHERED] <= recomputed.peak[GATHERED] * 1.25


def test_a_step_has_the_same_flop_in_float32() -> None:
    """Also where products on this machine's CPU are computed by an operation of which torch does not know them."""
    assert flop_of(costs("zero2", 2, dtype=torch.float32)) == flop_of(costs("zero2", 2)) > 0


def test_checkpointing_keeps_less_and_computes_more() -> None:
    kept, recomputed = costs("zero2", 2), costs("zero2", 2, checkpointing=True)
    assert recomputed.peak[SAVED] < kept.peak[SAVED] / 3
    assert 1.3 < flop_of(recomputed) / flop_of(kept) < 1.5
