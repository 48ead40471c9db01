"""Which attention kernels run, and why."""

import os
from typing import Any

import torch

from qvtune.errors import UserError
from qvtune.model.varlen import VARLEN, register_varlen

_HOPPER, _AMPERE = 9, 8  # major compute capability: H100/H200, A100

_HOW_TO_GET = {
    "flash_attention_2": "install it where a CUDA compiler is (pip install 'qvtune[cuda]' --no-build-isolation)",
    "flash_attention_3": (
        "build the package flash_attn_3 from the folder `hopper` of the flash-attention sources where a CUDA compiler "
        "is, and install that wheel on the compute nodes (they need no network then)"
    ),
}


def choose_attention(setting: str, dtype: torch.dtype, dropout: float = 0.0) -> tuple[str, str]:
    """The implementation's name in transformers, and the reason for the log; ``dropout``: the attention's.

    Raises UserError when an explicit choice cannot run here; ``auto`` never fails, it says what it did without.
    """
    if setting == "auto":
        return _best_here(dtype, dropout)
    problem = _obstacle(setting, dtype, dropout)
    if problem is not None:
        raise UserError(f"model.attention: {setting} {problem}; or set model.attention: auto")
    return setting, "as configured"


def prepare_attention(name: str, *, deterministic: bool) -> None:
    """Make the implementation known to transformers.

    ``deterministic``: backward gives the same bits at every call, with the flash kernels on a GPU. With sdpa and eager
    that is up to torch.
    """
    if name == VARLEN:
        register_varlen(deterministic=deterministic)
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = str(int(deterministic))  # transformers reads it at every call


def attention_dropout(config: Any) -> float:
    """Dropout of a transformers model's attention weights while it is trained."""
    names = ("attention_dropout", "attention_probs_dropout_prob")  # of decoders, of encoders
    return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 0.0)


def _best_here(dtype: torch.dtype, dropout: float) -> tuple[str, str]:
    on_gpu = torch.cuda.is_available()
    names = ("flash_attention_3", "flash_attention_2", VARLEN) if on_gpu else (VARLEN,)
    missing: list[str] = [] if on_gpu else ["no CUDA device"]
    for name in names:
        problem = _obstacle(name, dtype, dropout)
        if problem is None:
            best = f"best for {torch.cuda.get_device_name()}" if on_gpu else "one document after another"
            return name, "; ".join([best, *missing])
        missing.append(f"{name} {problem}")
    return "sdpa", "; ".join(missing)


def _obstacle(name: str, dtype: torch.dtype, dropout: float) -> str | None:
    """Why an implementation cannot run here, and how to get it; None when it can."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    on_gpu = torch.cuda.is_available()
    if name in (VARLEN, "flash_attention_3") and dropout:
        return f"has no dropout, and the model's attention has (config.json: {dropout:g})"
    if name in ("sdpa", "eager") or (name == VARLEN and not on_gpu):
        return None
    if not on_gpu:
        return "needs a CUDA device and there is none"
    capability = torch.cuda.get_device_capability()
    if name == "flash_attention_3" and capability[0] != _HOPPER:
        return f"runs on Hopper only, this is {torch.cuda.get_device_name()} (sm{capability[0]}{capability[1]})"
    if capability[0] < _AMPERE:
        return f"needs Ampere or newer, this is {torch.cuda.get_device_name()} (sm{capability[0]}{capability[1]})"
    if dtype == torch.float32:
        return "computes in bfloat16 or float16 only; set model.dtype: bfloat16"
    if name == VARLEN:
        has_kernel = torch.backends.cuda.is_flash_attention_available()
        return None if has_kernel else "is not in this build of torch; take one of pytorch.org"
    available = is_flash_attn_3_available() if name == "flash_attention_3" else is_flash_attn_2_available()
    return None if available else f"is not installed: {_HOW_TO_GET[name]}"


def choose_dtype(setting: str, on_gpus: bool | None = None) -> tuple[torch.dtype, str]:
    """The compute dtype, and the reason for the log.

    ``on_gpus`` says where a run will compute that is not on this machine (None); its GPUs are taken to have bfloat16.
    """
    if setting != "auto":
        return getattr(torch, setting), "as configured"
    if on_gpus is not None:
        return (torch.bfloat16, "on GPUs") if on_gpus else (torch.float32, "on CPUs")
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU computes in it"
    return torch.float32, "no GPU with bfloat16; on a CPU float32 is exact and runs everywhere at full speed"
