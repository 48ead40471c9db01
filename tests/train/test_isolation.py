"""The proof at start-up: passes where documents are apart, stops the run where they are not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from qvtune.data.batch import Batch, collate
from qvtune.tasks.causal_lm import CausalLMObjective
from qvtune.train import isolation
from qvtune.train.isolation import check_isolation
from tests.support.tiny import make_row

MakeObjective = Callable[..., CausalLMObjective]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.process_group, "max_over_ranks", lambda *values: list(values))
    monkeypatch.setattr(isolation.process_group, "sum_over_ranks", lambda *values: list(values))


class LeakingModel(nn.Module):
    """What an attention implementation does that ignores the documents."""

    def __init__(self, objective: CausalLMObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> torch.Tensor:
        rows, length = batch.input_ids.shape
        loss: torch.Tensor = self.objective(replace(batch, position_ids=torch.arange(length).expand(rows, length)))
        return loss


def test_isolated_documents_pass(make_objective: MakeObjective) -> None:
    engine = make_objective().train()
    line = check_isolation(engine, collate([make_row(9, 14, 6)], 0), torch.float32)
    assert line.startswith("packing: losses of packed and of separate documents differ by ")
    assert engine.training, "training goes on"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaking_attention_stops_the_run(make_objective: MakeObjective, dtype: torch.dtype) -> None:
    engine = LeakingModel(make_objective())
    with pytest.raises(RuntimeError, match=r"the attention lets documents attend to each other.*data\.packing: false"):
        check_isolation(engine, collate([make_row(9, 14, 6)], 0), dtype)


def test_a_difference_on_another_rank_stops_this_one_too(
    make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation.process_group, "max_over_ranks", lambda *values: [0.5])
    with pytest.raises(RuntimeError, match=r"differ by 5\.00e-01 nats"):
        check_isolation(make_objective(), collate([make_row(9, 14)], 0), torch.float32)


def test_a_loss_that_is_no_number_is_no_proof() -> None:
    class Broken(nn.Module):
        def forward(self, batch: Any) -> torch.Tensor:
            return torch.tensor(float("nan"))

    with pytest.raises(RuntimeError, match="loss of the first batch is not finite"):
        check_isolation(Broken(), collate([make_row(9, 14)], 0), torch.float32)
