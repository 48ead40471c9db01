"""The choice of attention kernels and dtype on machines that are not here."""

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from qvtune.errors import UserError
from qvtune.model.attention import attention_dropout, choose_attention, choose_dtype, prepare_attention

HOPPER, AMPERE, ADA, TURING = (9, 0), (8, 0), (8, 9), (7, 5)
BOTH, ONLY_2, NONE = (2, 3), (2,), ()  # which versions of flash attention are installed
Capability = tuple[int, int] | None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(capability: Capability, packages: tuple[int, ...] = (), has_bf16: bool = True) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Pretended GPU")
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bf16)
        monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: 2 in packages)
        monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: 3 in packages)

    return pretend


@pytest.mark.parametrize(
    ("capability", "packages", "expected", "reasons"),
    [
        (HOPPER, BOTH, "flash_attention_3", ["best for Pretended GPU"]),
        (HOPPER, ONLY_2, "flash_attention_2", ["flash_attention_3 is not installed", "flash_attn_3", "hopper"]),
        (HOPPER, NONE, "varlen", ["flash_attention_3 is not installed", "flash_attention_2 is not installed"]),
        (AMPERE, NONE, "varlen", ["best for Pretended GPU", "flash_attention_2 is not installed"]),
        (AMPERE, BOTH, "flash_attention_2", ["runs on Hopper only", "sm80"]),
        (AMPERE, ONLY_2, "flash_attention_2", ["best for Pretended GPU"]),
        (ADA, BOTH, "flash_attention_2", ["sm89"]),
        (TURING, BOTH, "sdpa", ["needs Ampere or newer", "sm75"]),
        (None, BOTH, "varlen", ["one document after another", "no CUDA device"]),
    ],
)
def test_auto_takes_the_best_there_is_and_says_why(
    machine: Callable[..., None], capability: Capability, packages: tuple[int, ...], expected: str, reasons: list[str]
) -> None:
    machine(capability, packages)
    name, reason = choose_attention("auto", torch.bfloat16)
    assert name == expected
    assert [part for part in reasons if part not in reason] == []


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [(HOPPER, BOTH, "flash_attention_2"), (HOPPER, NONE, "sdpa"), (None, NONE, "sdpa")],
)
def test_dropout_of_the_attention_is_not_left_out(
    machine: Callable[..., None], capability: Capability, packages: tuple[int, ...], expected: str
) -> None:
    """Flash attention 3 and torch's kernel have none."""
    machine(capability, packages)
    name, reason = choose_attention("auto", torch.bfloat16, dropout=0.1)
    assert name == expected
    assert "varlen has no dropout, and the model's attention has (config.json: 0.1)" in reason or packages
    with pytest.raises(UserError, match=r"model\.attention: varlen has no dropout.*; or set model\.attention: auto"):
        choose_attention("varlen", torch.bfloat16, dropout=0.1)


def test_a_build_of_torch_without_the_kernel(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(AMPERE)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    assert choose_attention("auto", torch.bfloat16)[0] == "sdpa"
    with pytest.raises(UserError, match=r"model\.attention: varlen is not in this build of torch"):
        choose_attention("varlen", torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"attention_dropout": 0.25}, 0.25),
        ({"attention_probs_dropout_prob": 0.1}, 0.1),
        ({"attention_dropout": None}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_dropout_that_a_model_has(config: dict[str, float | None], expected: float) -> None:
    assert attention_dropout(SimpleNamespace(**config)) == expected


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_flash_packages_are_asked_for_deterministic_kernels(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """transformers passes on what this variable says."""
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "as it was")
    prepare_attention("flash_attention_2", deterministic=deterministic)
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == str(int(deterministic))


@pytest.mark.parametrize("setting", ["sdpa", "eager", "varlen"])
def test_what_runs_everywhere_is_taken_as_it_is(machine: Callable[..., None], setting: str) -> None:
    machine(None)
    assert choose_attention(setting, torch.float32) == (setting, "as configured")


@pytest.mark.parametrize(("setting", "capability"), [("flash_attention_3", HOPPER), ("flash_attention_2", AMPERE)])
def test_an_explicit_choice_that_is_there(machine: Callable[..., None], setting: str, capability: Capability) -> None:
    machine(capability, BOTH)
    assert choose_attention(setting, torch.bfloat16) == (setting, "as configured")


@pytest.mark.parametrize(
    ("setting", "capability", "packages", "dtype", "message"),
    [
        ("flash_attention_2", None, NONE, torch.bfloat16, "needs a CUDA device and there is none"),
        ("flash_attention_3", None, NONE, torch.bfloat16, "needs a CUDA device and there is none"),
        ("flash_attention_2", AMPERE, NONE, torch.bfloat16, r"pip install 'qvtune\[cuda\]' --no-build-isolation"),
        ("flash_attention_3", HOPPER, ONLY_2, torch.bfloat16, "build the package flash_attn_3 .* need no network"),
        ("flash_attention_3", AMPERE, BOTH, torch.bfloat16, "runs on Hopper only, this is Pretended GPU"),
        ("flash_attention_2", TURING, BOTH, torch.bfloat16, "needs Ampere or newer"),
        ("flash_attention_2", AMPERE, BOTH, torch.float32, "set model.dtype: bfloat16"),
        ("varlen", AMPERE, NONE, torch.float32, "set model.dtype: bfloat16"),
        ("varlen", TURING, NONE, torch.bfloat16, "needs Ampere or newer"),
    ],
)
def test_an_explicit_choice_that_is_not_there(
    machine: Callable[..., None],
    setting: str,
    capability: Capability,
    packages: tuple[int, ...],
    dtype: torch.dtype,
    message: str,
) -> None:
    machine(capability, packages)
    with pytest.raises(UserError, match=rf"model\.attention: {setting} .*{message}.*or set model\.attention: auto"):
        choose_attention(setting, dtype)


@pytest.mark.parametrize(
    ("setting", "capability", "has_bf16", "expected"),
    [
        ("auto", None, True, torch.float32),
        ("auto", AMPERE, True, torch.bfloat16),
        ("auto", TURING, False, torch.float32),
        ("bfloat16", None, False, torch.bfloat16),
        ("float32", HOPPER, True, torch.float32),
    ],
)
def test_the_dtype(
    machine: Callable[..., None], setting: str, capability: Capability, has_bf16: bool, expected: torch.dtype
) -> None:
    machine(capability, has_bf16=has_bf16)
    dtype, reason = choose_dtype(setting)
    assert dtype == expected
    assert (reason == "as configured") is (setting != "auto")
