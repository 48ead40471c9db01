"""The evaluation loss does not depend on micro-batches and ranks, and every rank makes the same number of passes."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, collate
from qvtune.data.packing import PackedRow
from qvtune.errors import StopRequested
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
        self.numbers = [[7, 2], [0], [5, 9, 4], [3], [0, 6]]  # of the documents; 0 is divided, 1 and 8 are in no row

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def documents(self, index: int) -> NDArray[np.int64]:
        return np.array(self.numbers[index])


class Engine(nn.Module):
    device = "cpu"

    def __init__(self, objective: CausalLMObjective) -> None:
        super().__init__()
        self.objective, self.num_calls = objective, 0

    def forward(self, batch: Batch, num_correct: torch.Tensor, losses_N: torch.Tensor | None = None) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.num_calls += 1
        loss: torch.Tensor = self.objective(batch, num_correct, losses_N)
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


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 1), (1, 5), (2, 1), (3, 2), (8, 1)])
def test_the_loss_of_each_document_in_the_order_of_the_source(
    make_objective: Callable[..., CausalLMObjective],
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
    micro_batch_size: int,
) -> None:
    """Against each document in a row of its own; the rows do not divide evenly, and the last rank may have none."""
    rows: Any = Rows()
    objective = make_objective()
    expected: dict[int, list[float]] = {}
    for row, numbers in zip(rows.rows, rows.numbers, strict=True):
        for number, end, length in zip(numbers, np.cumsum(row.document_lengths), row.document_lengths, strict=True):
            alone = PackedRow(row.input_ids[end - length : end], row.labels[end - length : end], np.array([length]))
            with torch.no_grad():
                batch = collate([alone], pad_token_id=0)
                sums = expected.setdefault(number, [0.0, 0])
                sums[0] += objective(batch).item()
                sums[1] += batch.num_label_tokens
    monkeypatch.setattr(evaluate_module.process_group, "world_size", lambda: num_ranks)
    monkeypatch.setattr(evaluate_module.process_group, "sum_over_ranks", lambda *values: [values[0], 1, values[2]])
    gathered: list[Any] = []
    for is_complete in (False, True):  # first what each rank has, then with that of all
        for rank in range(num_ranks):
            monkeypatch.setattr(evaluate_module.process_group, "rank", lambda rank=rank: rank)

            def all_gather_object(own: Any, is_complete: bool = is_complete) -> list[Any]:
                if is_complete:
                    return gathered
                gathered.append(own)
                raise StopRequested

            monkeypatch.setattr(evaluate_module.process_group, "all_gather_object", all_gather_object)
            documents: dict[str, Any] = {}
            with nullcontext() if is_complete else pytest.raises(StopRequested):
                evaluate(Engine(objective), TASK, rows, micro_batch_size, 0, documents=documents)
        assert len(gathered) == num_ranks
    assert list(documents) == ["loss", "tokens"]
    found = list(zip(documents["loss"].tolist(), documents["tokens"].tolist(), strict=True))
    assert [tokens for _, tokens in found] == [expected[number][1] for number in sorted(expected)]
    assert [loss for loss, _ in found] == pytest.approx([expected[number][0] for number in sorted(expected)], rel=1e-5)


def test_the_sets_in_one_line() -> None:
    assert as_text({"eval": {"loss": 1.25, "accuracy": 0.5}}) == "loss 1.2500, accuracy 0.5000"
    assert as_text({"a": {"loss": 1.25}, "b": {"loss": 2.0}}) == "a: loss 1.2500; b: loss 2.0000"
