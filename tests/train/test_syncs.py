"""Inside forward and backward of a micro-batch the host never waits for the device, so a GPU is never without work.

Two ways to see it without a GPU: operations that need a value are noted while they run on the CPU, and tensors of the
device "meta", which take the way of a GPU's tensors, have no values that anything could wait for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvtune.config.schema import AdapterSection, ClassificationSection, ModelSection
from qvtune.data.batch import Batch
from qvtune.data.packing import PackedRow
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import prepare_attention
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.tasks import get_task
from qvtune.train.loop import train_on
from tests.support.syncs import Syncs
from tests.support.tiny import make_model_folder, make_row

# Where the host may wait -> why.
ALLOWED = {
    "_local_scalar_dense in find_packed_sequence_indices of masking_utils.py": (
        "transformers looks whether rows are packed before it makes a mask for sdpa or eager, once per forward; the "
        "flash kernels and varlen, which a GPU with bfloat16 has, need no mask"
    ),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Engine(nn.Module):
    """As much of DeepSpeed's engine as a micro-batch uses."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Any:
        return self.objective(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.fixture(params=["llama", "gemma3_text", "llama classifier", "bert classifier"])
def micro_batch(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., tuple[Engine, Batch]]:
    family, _, classifier = request.param.partition(" ")
    no_dropout = NO_DROPOUT if family == "bert" else {}
    folder = make_model_folder(tmp_path / family, family, dtype=torch.float32, **no_dropout)

    def make(attention: str, checkpointing: bool, adapter: str) -> tuple[Engine, Batch]:
        prepare_attention(attention, deterministic=True)
        settings = ClassificationSection(labels=("no", "yes"))
        task = get_task("sequence_classification" if classifier else "causal_lm", settings)
        options = {} if adapter == "full" else {"rank": 4, "dropout": 0.1}
        section = AdapterSection.model_validate({"method": adapter, **options})
        base = open_base(folder, ModelSection(), torch.float32, attention, section, task.head(seed=0))
        fill(base, Whole(torch.device("cpu")), torch.float32)
        model = add_adapters(base.model, section, str(folder), 0, task.peft_task_type, base.new_modules)
        if checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        rows = [make_row(9, 1, 17, 5, seed=1), make_row(11, 13, seed=2)]
        if classifier:
            rows = [_labelled(row, with_types=family == "bert") for row in rows]
        return Engine(task.objective(model)).train(), task.collate(rows, pad_token_id=0)

    return make


def _labelled(row: PackedRow, with_types: bool) -> PackedRow:
    labels = torch.full((len(row.labels),), -100, dtype=torch.int32).numpy()
    labels[row.document_lengths.cumsum() - row.document_lengths] = 1
    types = {"token_type_ids": labels * 0} if with_types else {}
    return PackedRow(row.input_ids, labels, row.document_lengths, **types)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_no_value_is_waited_for(
    micro_batch: Callable[..., tuple[Engine, Batch]], attention: str, checkpointing: bool
) -> None:
    engine, batch = micro_batch(attention, checkpointing, "lora")
    with Syncs() as syncs:
        loss = train_on(batch, engine, 0.5)
    assert set(syncs.found) <= set(ALLOWED), syncs.found
    assert (attention == "varlen") <= (not syncs.found), "it needs no mask"
    assert loss.item() > 0


@pytest.mark.parametrize("adapter", ["lora", "dora", "full"])
def test_on_tensors_without_values(micro_batch: Callable[..., tuple[Engine, Batch]], adapter: str) -> None:
    """What is not on the CPU takes torch's kernel for documents of different lengths, whose results have a shape."""
    engine, batch = micro_batch("varlen", True, adapter)
    engine.to("meta")
    loss = train_on(batch.to("meta"), engine, 0.5)
    assert loss.device.type == "meta"
    assert [name for name, parameter in trainable(engine) if parameter.grad is None] == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: tensor.masked_fill_(tensor > 0, 0).unique(),
        lambda tensor: torch.equal(tensor, tensor + 1),
    ],
)
def test_waiting_is_seen(wait: Callable[[torch.Tensor], Any]) -> None:
    with Syncs() as syncs:
        wait(torch.arange(4.0))
    assert syncs.found
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.arange(4.0, device="meta"))


def test_a_mask_that_is_written_through_is_seen() -> None:
    """On "meta" it is no error, since the result's shape is known."""
    tensor = torch.arange(4.0)
    with Syncs() as syncs:
        tensor[tensor > 0] = torch.zeros(3)
    assert syncs.found


@pytest.mark.parametrize("read", [torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_copy_to_the_host_is_an_error_without_values(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        read(torch.arange(4.0, device="meta"))
