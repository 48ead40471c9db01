"""The proof at start-up: passes where documents are apart, stops the run where they are not, however little it is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from qvtune.config.schema import AdapterSection, ClassificationSection, ModelSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch
from qvtune.model.adapters import add_adapters
from qvtune.model.attention import prepare_attention
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.tasks import get_task
from qvtune.tasks.causal_lm import TASK
from qvtune.train import isolation
from qvtune.train.isolation import check_isolation
from tests.support.tiny import DECODERS, ENCODERS, make_model_folder, make_row

LEAKING = "leaking"  # among transformers' attention implementations
ROW = make_row(9, 14, 6, 60)
LEAK = r"changes the hidden states of its neighbours by .* the attention lets documents attend to each other.*"


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.process_group, "max_over_ranks", lambda *values: list(values))


class Engine(nn.Module):
    """As much of DeepSpeed's engine as the check uses; notes the tokens that it is given."""

    device = "cpu"

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective, self.num_tokens, self.calls = objective, 0, 0

    def forward(self, batch: Batch, return_hidden_states: bool) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        self.num_tokens += batch.input_ids.numel()
        return self.objective(batch, return_hidden_states=return_hidden_states)  # type: ignore[no-any-return]


def make_engine(folder: Path, attention: str, dtype: torch.dtype, task: Any = TASK) -> Engine:
    prepare_attention(attention, deterministic=True)
    base = open_base(folder, ModelSection(), dtype, attention, head=task.head(seed=0))
    fill(base, Whole(torch.device("cpu")), dtype)
    model = add_adapters(base.model, AdapterSection(rank=4), str(folder), 0, task.peft_task_type, base.new_modules)
    return Engine(task.objective(model)).train()


def check(engine: Engine, attention: str, dtype: torch.dtype = torch.float32, row: Any = ROW, task: Any = TASK) -> str:
    return check_isolation(engine, task, row, 0, attention, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "varlen", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_isolated_documents_pass(tmp_path: Path, family: str, attention: str, dtype: torch.dtype) -> None:
    engine = make_engine(make_model_folder(tmp_path / family, family), attention, dtype)
    line = check(engine, attention, dtype)
    assert line.startswith("packing: hidden states of a document ")
    assert attention == "eager" or "are equal in every bit" in line
    assert engine.training, "training goes on"
    assert (engine.calls, engine.num_tokens) == (3, 3 * 2 * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("family", ENCODERS)
def test_documents_of_encoders_pass(tmp_path: Path, family: str, attention: str, dtype: torch.dtype) -> None:
    task = get_task("sequence_classification", ClassificationSection(labels=("no", "yes")))
    engine = make_engine(make_model_folder(tmp_path / family, family), attention, dtype, task)
    types = np.zeros_like(ROW.input_ids) if family == "bert" else np.empty(0, np.int32)
    assert "equal in every bit" in check(engine, attention, dtype, replace(ROW, token_type_ids=types), task)


# What an implementation may get wrong with the borders of the documents, offsets into the flattened tokens.
LEAKS: dict[str, Callable[[list[int], int], list[int]]] = {
    "no_documents": lambda borders, length: list(range(0, borders[-1] + 1, length)),
    "one_border_missing": lambda borders, _: [*borders[:1], *borders[2:]],
    "the_last_one_missing": lambda borders, _: [*borders[:-2], borders[-1]],
    "one_token_late": lambda borders, _: [0, *(border + 1 for border in borders[1:-1]), borders[-1]],
    "one_token_early": lambda borders, _: [0, *(border - 1 for border in borders[1:-1]), borders[-1]],
}


@pytest.fixture(params=LEAKS)
def leaking(request: pytest.FixtureRequest) -> str:
    """Name of an attention that takes other borders than it is given."""
    change = LEAKS[request.param]

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: None, *, cu_seq_lens_q: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor, None]:
        rows, heads, length, _ = query.shape
        lines = [
            states.repeat_interleave(heads // states.shape[1], dim=1).transpose(0, 1).flatten(1, 2)
            for states in (query, key, value)
        ]
        documents = [
            scaled_dot_product_attention(*(states[:, start:end] for states in lines), is_causal=True)
            for start, end in pairwise(change(cu_seq_lens_q.tolist(), length))
        ]
        return torch.cat(documents, dim=1).unflatten(1, (rows, length)).permute(1, 2, 0, 3).contiguous(), None

    AttentionInterface.register(LEAKING, attention)
    AttentionMaskInterface.register(LEAKING, flash_attention_mask)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaking_attention_stops_the_run(llama_folder: Path, leaking: str, dtype: torch.dtype) -> None:
    engine = make_engine(llama_folder, LEAKING, dtype)
    with pytest.raises(RuntimeError, match=LEAK + r"data\.packing: false"):
        check(engine, LEAKING, dtype)


def test_the_data_do_not_matter(llama_folder: Path) -> None:
    """A row of one document, one of few tokens, one of the same token, one without a label."""
    engine = make_engine(llama_folder, "sdpa", torch.float32)
    short = replace(ROW, input_ids=ROW.input_ids[:5], labels=ROW.labels[:5], document_lengths=np.array([5], np.int32))
    alike = replace(ROW, input_ids=np.zeros_like(ROW.input_ids))
    unlabelled = replace(ROW, labels=np.full_like(ROW.labels, IGNORE_INDEX))
    for row in (make_row(100), short, alike, unlabelled):
        assert "equal in every bit" in check(engine, "sdpa", row=row)


def test_the_data_do_not_hide_a_leak(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows with positions that tell nothing of the documents, from which sdpa's mask is made."""
    engine = make_engine(llama_folder, "sdpa", torch.float32)
    collate = TASK.collate

    def without_documents(rows: Any, pad_token_id: int) -> Batch:
        batch = collate(rows, pad_token_id)
        return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))

    monkeypatch.setattr(TASK, "collate", without_documents)
    for row in (make_row(100), make_row(60, 40), replace(ROW, labels=np.full_like(ROW.labels, IGNORE_INDEX))):
        with pytest.raises(RuntimeError, match=LEAK):
            check(engine, "sdpa", row=row)


def test_a_difference_on_another_rank_stops_this_one_too(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.process_group, "max_over_ranks", lambda *values: [0.5, *values[1:]])
    with pytest.raises(RuntimeError, match=r"by 5\.00e-01 of the largest"):
        check(make_engine(llama_folder, "sdpa", torch.float32), "sdpa")


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "not finite before any training"), (1.0, "base has no use of its input")]
)
def test_what_is_no_proof(value: float, message: str) -> None:
    engine = Engine(lambda batch, return_hidden_states: torch.full((*batch.input_ids.shape, 3), value)).train()
    with pytest.raises(RuntimeError, match=message):
        check(engine, "sdpa")
