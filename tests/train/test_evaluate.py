"""The evaluation loss does not depend on micro-batches and ranks, and every rank makes the same number of passes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, collate
from qvtune.data.packing import PackedRow
from qvtune.tasks.causal_lm import TASK, CausalLMObjective
from qvtune.train import evaluate as evaluate_module
from qvtune.train.evaluate import as_text, evaluate, evaluate_sets
from tests.support.tiny import make_row

LENGTHS = [(9, 4), (20,), (7, 7, 7), (3,), (12, 5)]
NUM_ROWS = len(LENGTHS)


class Rows(Sequence[PackedRow]):
    """As much of TokenRows as evaluation uses."""

    def __init__(self) -> None:
        self.rows = [make_row(*lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]
        self.num_label_tokens = np.array([(row.labels != IGNORE_INDEX).sum() for row in self.rows])

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


class Engine(nn.Module):
    device = "cpu"

    def __init__(self, objective: CausalLMObjective) -> None:
        super().__init__()
        self.objective, self.num_calls = objective, 0

    def forward(self, batch: Batch, num_correct: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.num_calls += 1
        loss: torch.Tensor = self.objective(batch, num_correct)
        return loss


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch_size", "num_passes"), [(1, 1, 5), (1, 2, 3), (2, 1, 3), (2, 2, 2), (3, 1, 2), (3, 8, 1)]
)
def test_the_mean_over_all_label_tokens(
    make_objective: Callable[..., CausalLMObjective],
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
    micro_batch_size: int,
    num_passes: int,
) -> None:
    rows: Any = Rows()
    objective = make_objective()
    with torch.no_grad():
        num_correct = torch.zeros((), dtype=torch.int64)
        total = sum(objective(collate([row], pad_token_id=0), num_correct).item() for row in rows)
    num_labels = sum((row.labels != IGNORE_INDEX).sum() for row in rows)
    expected = total / num_labels
    monkeypatch.setattr(evaluate_module.process_group, "world_size", lambda: num_ranks)
    own_sums: list[tuple[float, ...]] = []

    def sum_over_ranks(*sums: float) -> list[float]:
        own_sums.append(sums)
        return [sums[0], sums[1] or 1, sums[2]]

    monkeypatch.setattr(evaluate_module.process_group, "sum_over_ranks", sum_over_ranks)
    for rank in range(num_ranks):
        monkeypatch.setattr(evaluate_module.process_group, "rank", lambda rank=rank: rank)
        engine = Engine(objective)
        metrics, seconds = evaluate(engine, TASK, rows, micro_batch_size, pad_token_id=0)
        assert engine.num_calls == num_passes, "ZeRO-3 gathers in every pass: all ranks take part"
        assert engine.training and seconds > 0
        loss = own_sums[-1][0] / (own_sums[-1][1] or 1)
        accuracy = own_sums[-1][2] / (own_sums[-1][1] or 1)
        assert metrics == {"loss": loss, "token_accuracy": accuracy, "perplexity": math.exp(loss)}
    assert len(own_sums) == num_ranks
    losses, counts, correct = (sum(of_ranks) for of_ranks in zip(*own_sums, strict=True))
    assert losses / counts == pytest.approx(expected, rel=1e-5)
    assert (counts, correct) == (num_labels, num_correct.item())


def test_each_set_has_a_loss_of_its_own(
    make_objective: Callable[..., CausalLMObjective], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module.process_group, "sum_over_ranks", lambda *values: list(values))
    rows: Any = Rows()
    parts = {"first": rows[:2], "second": rows[2:]}
    engine = Engine(make_objective())
    found, seconds = evaluate_sets(engine, TASK, parts, 1, 0, lambda: None)
    assert found == {name: evaluate(engine, TASK, part, 1, 0)[0] for name, part in parts.items()}
    assert list(found) == ["first", "second"] and found["first"] != found["second"]
    assert seconds > 0


def test_the_sets_in_one_line() -> None:
    assert as_text({"eval": {"loss": 1.25, "accuracy": 0.5}}) == "loss 1.2500, accuracy 0.5000"
    assert as_text({"a": {"loss": 1.25}, "b": {"loss": 2.0}}) == "a: loss 1.2500; b: loss 2.0000"
