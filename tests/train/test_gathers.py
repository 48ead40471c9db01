"""What ZeRO-3 gathers for a micro-batch, on rank 0 of ranks that pretend."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from transformers import LlamaConfig

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.data.batch import collate
from qvtune.distributed.fake_ranks import fake_ranks
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.shard import ZeroPartition
from qvtune.model.skeleton import build_skeleton
from qvtune.tasks.causal_lm import CausalLMObjective, FrozenHeadLoss
from tests.support.tiny import VOCABULARY, make_row

CONFIG = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def make_engine() -> Any:
    import deepspeed

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    skeleton = build_skeleton(config, ModelSection(), torch.float32, "sdpa")
    placement = ZeroPartition(CONFIG, torch.float32)
    for module in skeleton.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            own = torch.zeros(placement.shard.numel(empty.numel()))
            setattr(module, name, placement.parameter(tuple(empty.shape), own))
    model = add_adapters(skeleton.to("cpu"), AdapterSection(rank=4), "tiny", 0)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)])
    objective = CausalLMObjective(model)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=CONFIG, dist_init_required=False)
    return engine


def test_the_head_is_gathered_once_for_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are known in forward: it may be the largest matrix of the model."""
    fetched: list[tuple[str, bool]] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noting(self: Any, module: Any, forward: bool) -> Any:
        fetched.append((type(module).__name__, forward))
        return fetch(self, module, forward)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", noting)
    batch = collate([make_row(9, 14, 6)], 0)
    with fake_ranks(2):
        engine = make_engine()
        for _ in range(3):  # it prefetches from the third on
            fetched.clear()
            engine.backward(engine(batch))
            engine.step()
        head = [forward for name, forward in fetched if name == FrozenHeadLoss.__name__]
        assert head == [True]
        assert {forward for name, forward in fetched if name == "NF4Linear"} == {True, False}
        engine.destroy()
