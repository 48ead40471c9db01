"""Loss and gradients against transformers, PEFT and F.cross_entropy, each document by itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, collate, empty_batch
from qvtune.data.packing import PackedRow
from qvtune.model.adapters import trainable, transformers_model
from qvtune.model.attention import prepare_attention
from qvtune.tasks import causal_lm as objective_module
from qvtune.tasks.causal_lm import CausalLMObjective, FrozenHeadLoss, head_cross_entropy
from tests.support.separate import separate
from tests.support.tiny import DECODERS, VOCABULARY, four_bit_config, make_model_folder, make_row
from tests.support.varlen_attention import VARLEN, register_varlen

MakeObjective = Callable[..., CausalLMObjective]
# One row full of documents, of one token too, and one that ends in padding.
PACKED = [make_row(9, 1, 17, 5, seed=1), make_row(11, 13, seed=2)]
NUM_LABELS = (6 + 0 + 12 + 4) + (8 + 9)


@pytest.fixture(autouse=True)
def _attention() -> None:
    prepare_attention("varlen", deterministic=True)


def packed_batch() -> Batch:
    batch = collate(PACKED, pad_token_id=0)
    assert batch.num_label_tokens == NUM_LABELS and batch.input_ids.shape == (2, 32)
    return batch


def loss_and_gradients(objective: CausalLMObjective, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    objective.zero_grad()
    loss = objective(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(objective.model)}
    assert len(gradients) == 8 and all(gradient is not None for gradient in gradients.values())
    return loss.item(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    """Relative to the largest entry of each tensor: single entries can be sums that cancel."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=rtol * tensor.abs().max().item())


def peft_reference(objective: CausalLMObjective, folder: Path, quantization: str) -> Any:
    """transformers' model with PEFT's adapter and the same factors."""
    options = {"quantization_config": four_bit_config()} if quantization == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).train()  # in eval mode bitsandbytes takes less exact CPU kernels
    _, unexpected = model.load_state_dict(dict(trainable(objective.model)), strict=False)
    assert not unexpected
    return model


def documents(rows: Sequence[PackedRow]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and unshifted labels, [1, tokens] each, straight from the rows."""
    return [
        (
            torch.from_numpy(row.input_ids[end - length : end]).long()[None],
            torch.from_numpy(row.labels[end - length : end]).long()[None],
        )
        for row in rows
        for length, end in zip(row.document_lengths, row.document_lengths.cumsum(), strict=True)
    ]


@pytest.mark.parametrize(("family", "quantization"), [*((name, "nf4") for name in DECODERS), ("llama", "none")])
def test_loss_and_gradients_equal_transformers_and_peft(
    make_objective: MakeObjective, tmp_path: Path, family: str, quantization: str
) -> None:
    folder = make_model_folder(tmp_path / family, family, dtype=torch.float32, tie=family == "qwen2")
    objective = make_objective(folder, quantization=quantization)
    reference = peft_reference(objective, folder, quantization)
    total = torch.zeros(())
    for input_ids, labels in documents(PACKED):
        logits = reference(input_ids=input_ids).logits
        total = total + functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    total.backward()

    loss, gradients = loss_and_gradients(objective, packed_batch())

    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert_close(gradients, {name: parameter.grad for name, parameter in trainable(reference)})


@pytest.mark.parametrize("num_rows", [1, 3, 39, 100])
def test_chunks_change_nothing(make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Of 39 label positions: one at a time, a last chunk that is full or not, one for all."""
    objective = make_objective()
    expected_loss, expected = loss_and_gradients(objective, packed_batch())
    monkeypatch.setitem(objective_module.MIN_CHUNK_ROWS, "cpu", num_rows)
    monkeypatch.setattr(objective_module, "_CHUNK_LOGITS", 0)
    loss, gradients = loss_and_gradients(objective, packed_batch())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(gradients, expected, rtol=1e-6)


@pytest.mark.parametrize(("device", "expected"), [("cpu", [992, 992, 516]), ("meta", [1024, 1024, 452])])
def test_chunks_are_large_but_on_cpus(monkeypatch: pytest.MonkeyPatch, device: str, expected: list[int]) -> None:
    """A GPU would wait for the host between small ones. On a CPU they have a number of rows that oneDNN takes."""
    monkeypatch.setattr(objective_module, "_CHUNK_LOGITS", 1000 * VOCABULARY)
    head = FrozenHeadLoss(nn.Linear(16, VOCABULARY, device=device).requires_grad_(False))
    linear, chunks = objective_module.linear, []

    def counting(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        chunks.append(len(hidden))
        return linear(hidden, *others)

    monkeypatch.setattr(objective_module, "linear", counting)
    head(torch.zeros(2500, 16, device=device), torch.zeros(2500, dtype=torch.int64, device=device))
    assert chunks == expected


@pytest.mark.parametrize("num_rows", [3, 100])
def test_labels_with_the_largest_logit_are_counted(
    make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    """Half of the labels are what the model itself predicts; counting does not change a bit of the loss."""
    objective, batch = make_objective(), packed_batch()
    monkeypatch.setitem(objective_module.MIN_CHUNK_ROWS, "cpu", num_rows)
    monkeypatch.setattr(objective_module, "_CHUNK_LOGITS", 0)
    model: Any = transformers_model(objective.model)
    with torch.no_grad():
        positions = {"position_ids": batch.position_ids, "use_cache": False}  # a cache would undo the isolation
        hidden = model.model(batch.input_ids, attention_mask=None, **positions).last_hidden_state
        predicted = model.lm_head(hidden).argmax(-1)
        at_label = (batch.labels != IGNORE_INDEX).nonzero()
        labels = batch.labels.clone()
        for row, position in at_label[::2].tolist():
            labels[row, position] = predicted[row, position]
        expected = int((labels == predicted).sum())
        assert NUM_LABELS // 2 <= expected < NUM_LABELS
        counted = replace(batch, labels=labels)
        num_correct = torch.tensor(7)
        assert torch.equal(objective(counted, num_correct=num_correct), objective(counted))
        assert num_correct.item() == 7 + expected, "added to what was there"


def test_without_labels_loss_and_gradients_are_zero(make_objective: MakeObjective) -> None:
    loss, gradients = loss_and_gradients(make_objective(), empty_batch(pad_token_id=0))
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


def test_without_gradients_the_loss_is_the_same(make_objective: MakeObjective) -> None:
    objective = make_objective()
    expected, _ = loss_and_gradients(objective, packed_batch())
    with torch.no_grad():
        assert objective(packed_batch()).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_head_equals_cross_entropy(with_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 31, bias=with_bias, dtype=dtype).requires_grad_(False)
    labels = torch.randint(31, (40,))
    ours = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss = head_cross_entropy(FrozenHeadLoss(head), ours, labels)
    expected = functional.cross_entropy(head(theirs).float(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (loss * 3.0).backward()
    (expected * 3.0).backward()
    # bf16: both round the gradient of the logits and that of the hidden states to 8 bits, scaled by 3 before or after.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_a_head_that_is_trained_is_refused() -> None:
    with pytest.raises(AssertionError):
        FrozenHeadLoss(nn.Linear(4, 4))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", VARLEN])
def test_packed_equals_separate(make_objective: MakeObjective, attention: str) -> None:
    varlen = register_varlen()
    objective = make_objective(attention=attention)
    batch = packed_batch()
    packed_loss, packed = loss_and_gradients(objective, batch)
    separate_loss, apart = loss_and_gradients(objective, separate(batch))
    assert packed_loss == pytest.approx(separate_loss, rel=1e-5)
    assert_close(packed, apart)
    assert varlen.num_calls == (4 if attention == VARLEN else 0), "two batches, two layers"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", VARLEN])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_packed_equals_separate_within_a_sliding_window(
    make_objective: MakeObjective, tmp_path: Path, family: str, attention: str
) -> None:
    """The window is shorter than most documents and longer than some: neither rule may undo the other."""
    register_varlen()
    folder = make_model_folder(tmp_path / family, family, dtype=torch.float32)
    objective = make_objective(folder, attention=attention)
    batch = packed_batch()
    packed_loss, packed = loss_and_gradients(objective, batch)
    separate_loss, apart = loss_and_gradients(objective, separate(batch))
    assert packed_loss == pytest.approx(separate_loss, rel=1e-5)
    assert_close(packed, apart)
    expected_loss, expected = loss_and_gradients(make_objective(folder), batch)
    assert packed_loss == pytest.approx(expected_loss, rel=1e-5), "the same for all implementations"
    assert_close(packed, expected)
    with torch.no_grad():
        assert abs(objective(one_document_a_row(batch)).item() - packed_loss) / NUM_LABELS > 1e-3
        without = make_objective(
            make_model_folder(tmp_path / "without", family, dtype=torch.float32, sliding_window=256),
            attention=attention,
        )
        assert abs(without(batch).item() - packed_loss) / NUM_LABELS > 1e-3, "the window decides something"


def one_document_a_row(batch: Batch) -> Batch:
    """Isolation switched off: positions and offsets that tell nothing of the documents."""
    rows, length = batch.input_ids.shape
    return replace(
        batch,
        position_ids=torch.arange(length).expand(rows, length),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", VARLEN])
def test_switching_isolation_off_is_seen(make_objective: MakeObjective, attention: str) -> None:
    """The comparison above can fail: documents that see each other have another loss."""
    register_varlen()
    objective = make_objective(attention=attention)
    batch = packed_batch()
    with torch.no_grad():
        leaking, apart = objective(one_document_a_row(batch)).item(), objective(separate(batch)).item()
    assert abs(leaking - apart) / NUM_LABELS > 1e-3


@pytest.mark.parametrize("attention", ["varlen", VARLEN])
def test_only_the_offsets_isolate_the_varlen_kernels(make_objective: MakeObjective, attention: str) -> None:
    """Positions alone do not: rotary embeddings are relative, and the kernels never see a mask."""
    register_varlen()
    objective = make_objective(attention=attention)
    batch = packed_batch()
    leaking = replace(one_document_a_row(batch), position_ids=batch.position_ids)
    with torch.no_grad():
        assert abs(objective(leaking).item() - objective(batch).item()) / NUM_LABELS > 1e-3


@pytest.mark.parametrize(
    "damage",
    [
        lambda batch: replace(batch, cu_seqlens=batch.cu_seqlens.long()),
        lambda batch: replace(batch, cu_seqlens=batch.cu_seqlens[1:]),
        lambda batch: replace(batch, cu_seqlens=batch.cu_seqlens[:-1]),
        lambda batch: replace(batch, max_seqlen=batch.max_seqlen - 1),
        lambda batch: replace(batch, max_seqlen=torch.tensor(batch.max_seqlen)),
    ],
    ids=["int64", "no_start", "no_end", "too_short", "a_tensor"],
)
def test_the_contract_notices_wrong_metadata(make_objective: MakeObjective, damage: Callable[[Batch], Batch]) -> None:
    register_varlen()
    with pytest.raises(AssertionError), torch.no_grad():
        make_objective(attention=VARLEN)(damage(packed_batch()))


@pytest.mark.parametrize("attention", ["varlen", VARLEN])
def test_varlen_equals_sdpa(make_objective: MakeObjective, attention: str) -> None:
    register_varlen()
    batch = packed_batch()
    loss, gradients = loss_and_gradients(make_objective(attention=attention), batch)
    expected_loss, expected = loss_and_gradients(make_objective(attention="sdpa"), batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients, expected)


def test_the_parts_of_transformers_before_the_kernel(
    make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own flash attention path on our batch, with plain PyTorch in the place of the kernel alone."""
    from transformers import AttentionInterface, modeling_flash_attention_utils
    from transformers.integrations.flash_attention import flash_attention_forward

    calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(  # the signature of flash-attn 2; transformers looks at the names
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        calls.append({"causal": causal, "dropout_p": dropout_p, "max_seqlen_q": max_seqlen_q})
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return torch.cat(
            [
                functional.scaled_dot_product_attention(
                    *(states[start:end].transpose(0, 1) for states in (q, k, v)),
                    is_causal=causal,
                    scale=softmax_scale,
                    enable_gqa=True,
                ).transpose(0, 1)
                for start, end in pairwise(cu_seqlens_q.tolist())
            ]
        )

    process = modeling_flash_attention_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda implementation: ((None, flash_attn_varlen_func, None, None, None), (process, process)),
    )
    register_varlen()
    AttentionInterface.register(VARLEN, flash_attention_forward)
    batch = packed_batch()
    loss, gradients = loss_and_gradients(make_objective(attention=VARLEN), batch)
    expected_loss, expected = loss_and_gradients(make_objective(attention="sdpa"), batch)
    assert calls == [{"causal": True, "dropout_p": 0.0, "max_seqlen_q": 17}] * 2
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients, expected)
