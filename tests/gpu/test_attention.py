"""The flash kernels themselves: packed documents have the loss of the same documents apart, and no host waits.

The same comparison as in tests/tasks/test_causal_lm.py, where plain PyTorch stands for the kernels. To run it: a
machine with an A100 or newer, `make env TORCH_BACKEND=auto`, `pytest tests/gpu`.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from qvtune.config.schema import AdapterSection, ModelSection
from qvtune.data.batch import Batch, collate
from qvtune.errors import UserError
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.attention import choose_attention, prepare_attention
from qvtune.model.loader import load_whole
from qvtune.tasks.causal_lm import CausalLMObjective
from qvtune.train.loop import train_on
from tests.support.separate import separate
from tests.support.tiny import make_model_folder, make_row

pytestmark = pytest.mark.gpu
# Mean loss in nats, and cosine between gradients. bf16 keeps 8 bits and the kernels sum in another order for other
# lengths; documents that see each other turn the gradient by far more.
TOLERANCE, SAME_GRADIENT, OTHER_GRADIENT = 2e-2, 0.999, 0.95


@pytest.fixture(params=["flash_attention_2", "flash_attention_3", "varlen"])
def attention(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("would run with a GPU")
    try:
        name = choose_attention(request.param, torch.bfloat16)[0]
    except UserError as error:
        pytest.skip(f"would run with the kernels' package: {error}")
    prepare_attention(name, deterministic=True)
    return name


@pytest.fixture
def batch() -> Batch:
    rows = [make_row(30, 1, 77, 20, seed=1), make_row(64, 50, seed=2)]
    return collate(rows, pad_token_id=0).to("cuda")


@pytest.fixture
def objective(tmp_path: Path, attention: str) -> CausalLMObjective:
    folder = make_model_folder(tmp_path / "llama", head_dim=64)
    base = load_whole(folder, ModelSection(), torch.bfloat16, attention, torch.device("cuda"))
    adapted = add_adapters(base, AdapterSection(rank=4), str(folder), seed=0).to("cuda")
    torch.manual_seed(1)
    for name, parameter in trainable(adapted):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return CausalLMObjective(adapted)


def mean_and_gradients(objective: CausalLMObjective, batch: Batch) -> tuple[float, torch.Tensor]:
    """Mean loss, and all gradients in one vector."""
    objective.zero_grad()
    loss = objective(batch) / batch.num_label_tokens
    loss.backward()
    gradients: list[Any] = [parameter.grad for _, parameter in trainable(objective.model)]
    return loss.item(), torch.cat([gradient.flatten().float() for gradient in gradients])


def test_packed_equals_separate(objective: CausalLMObjective, batch: Batch) -> None:
    packed_loss, packed = mean_and_gradients(objective, batch)
    separate_loss, apart = mean_and_gradients(objective, separate(batch))
    assert packed_loss == pytest.approx(separate_loss, abs=TOLERANCE)
    assert cosine_similarity(packed, apart, dim=0) > SAME_GRADIENT


def test_backward_gives_the_same_bits_every_time(objective: CausalLMObjective) -> None:
    """Many documents of many tokens: without deterministic kernels blocks add in the order in which they end."""
    batch = collate([make_row(*[250] * 8, seed=seed) for seed in range(4)], pad_token_id=0).to("cuda")
    loss, gradients = mean_and_gradients(objective, batch)
    for _ in range(10):
        again, others = mean_and_gradients(objective, batch)
        assert loss == again and torch.equal(gradients, others)


def test_the_host_waits_for_nothing(objective: CausalLMObjective, batch: Batch, attention: str) -> None:
    """torch itself says where it waits. With the packages transformers looks once at the positions."""
    engine: Any = lambda batch: objective(batch)  # noqa: E731
    engine.backward = torch.Tensor.backward
    train_on(batch, engine, 1.0)  # what is made once
    host = collate([make_row(30, 1, 77, 20, seed=1)], pad_token_id=0).pin_memory()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_on(host.to("cuda"), engine, 1.0)
        torch.cuda.set_sync_debug_mode("default")
    found = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
    assert len(found) <= (0 if attention == "varlen" else 1), found


def test_equals_sdpa(objective: CausalLMObjective, batch: Batch) -> None:
    loss, _ = mean_and_gradients(objective, batch)
    objective.model.get_base_model().set_attn_implementation("sdpa")  # type: ignore[operator]
    assert loss == pytest.approx(mean_and_gradients(objective, batch)[0], abs=TOLERANCE)


def test_switching_isolation_off_is_seen(objective: CausalLMObjective, batch: Batch) -> None:
    rows, length = batch.input_ids.shape
    offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device="cuda")
    leaking = replace(batch, cu_seqlens=offsets, max_seqlen=length)
    _, together = mean_and_gradients(objective, leaking)
    _, apart = mean_and_gradients(objective, separate(batch))
    assert cosine_similarity(together, apart, dim=0) < OTHER_GRADIENT
