from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.config.schema import ModelSection
from qvtune.merge.proof import EXACT, PROMPTS, ROUNDED, Limits, compare, fixed_prompts, load_adapted
from tests.merge.conftest import MakeRun

VOCABULARY = 50
TEXTS = [list(range(1, 101)), [7, 8, 9]]  # the first is compared in two chunks


class Table(nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(128, VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_the_same_model_passes(logits: torch.Tensor) -> None:
    proof = compare(Table(logits), Table(logits.clone()), TEXTS, EXACT)
    assert (proof.positions, proof.top1_agreement) == (103, 1.0)
    assert proof.max_abs_difference == proof.mean_abs_difference == 0
    assert abs(proof.mean_kl) < 1e-7
    assert proof.passed


def test_differences_are_measured_over_all_positions(logits: torch.Tensor) -> None:
    other = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    proof = compare(Table(logits), Table(other), TEXTS, ROUNDED)
    ids = torch.tensor([*TEXTS[0], *TEXTS[1]])
    p, q = logits[ids].double(), other[ids].double()
    assert proof.max_abs_difference == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert proof.mean_abs_difference == pytest.approx(float((p - q).abs().mean()), rel=1e-6)
    kl = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert proof.mean_kl == pytest.approx(float(kl), rel=1e-5)
    assert proof.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < proof.top1_agreement < 1
    assert not proof.passed


@pytest.mark.parametrize("limits", [EXACT, ROUNDED])
def test_one_logit_that_is_not_finite_fails(logits: torch.Tensor, limits: Limits) -> None:
    broken = logits.clone()
    broken[8, 3] = torch.nan
    assert not compare(Table(logits), Table(broken), TEXTS, limits).passed
    assert not compare(Table(broken), Table(broken), TEXTS, limits).passed


def test_one_logit_that_is_off_fails_where_weights_are_exact(logits: torch.Tensor) -> None:
    other = logits.clone()
    other[8, int(logits[8].argmin())] += 0.01
    assert not compare(Table(logits), Table(other), TEXTS, EXACT).passed
    assert compare(Table(logits), Table(other), TEXTS, ROUNDED).passed


def test_prompts_are_a_users_turn_or_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [tokenizer.decode(ids) for ids in fixed_prompts(tokenizer)]
    tokenizer.chat_template = None
    plain = [tokenizer.decode(ids) for ids in fixed_prompts(tokenizer)]
    assert plain == list(PROMPTS)
    assert chat[0].endswith(f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapted_model_has_the_weights_of_training_and_computes_in_float32(
    make_run: MakeRun, llama_folder: Path, dtype: torch.dtype
) -> None:
    checkpoint = checkpoint_folder.resolve(make_run(llama_folder, dtype=dtype))
    adapted = load_adapted(llama_folder, ModelSection(), checkpoint, dtype)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            state.dtype = dtype
            module.weight.data = bnb.dequantize_4bit(codes, state).float()
    expected = PeftModel.from_pretrained(base, checkpoint)
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
