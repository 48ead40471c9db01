"""Which attention kernels run, and why."""

import torch

from qvtune.errors import UserError

_HOPPER, _AMPERE = 9, 8  # major compute capability: H100/H200, A100

_HOW_TO_GET = {
    "flash_attention_2": "install it where a CUDA compiler is (pip install 'qvtune[cuda]' --no-build-isolation)",
    "flash_attention_3": (
        "build the package flash_attn_3 from the folder `hopper` of the flash-attention sources where a CUDA compiler "
        "is, and install that wheel on the compute nodes (they need no network then)"
    ),
}


def choose_attention(setting: str, dtype: torch.dtype) -> tuple[str, str]:
    """The implementation's name in transformers, and the reason for the log.

    Raises UserError when an explicit choice cannot run here; ``auto`` never fails, it says what it did without.
    """
    if setting == "auto":
        return _best_here(dtype)
    problem = _obstacle(setting, dtype)
    if problem is not None:
        raise UserError(f"model.attention: {setting} {problem}; or set model.attention: auto")
    return setting, "as configured"


def _best_here(dtype: torch.dtype) -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "sdpa", "no CUDA device"
    missing: list[str] = []
    for name in ("flash_attention_3", "flash_attention_2"):
        problem = _obstacle(name, dtype)
        if problem is None:
            return name, "; ".join([f"best for {torch.cuda.get_device_name()}", *missing])
        missing.append(f"{name} {problem}")
    return "sdpa", "; ".join(missing)


def _obstacle(name: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run here, and how to get it; None when it can."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name in ("sdpa", "eager"):
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device and there is none"
    capability = torch.cuda.get_device_capability()
    if name == "flash_attention_3" and capability[0] != _HOPPER:
        return f"runs on Hopper only, this is {torch.cuda.get_device_name()} (sm{capability[0]}{capability[1]})"
    if name == "flash_attention_2" and capability[0] < _AMPERE:
        return f"needs Ampere or newer, this is {torch.cuda.get_device_name()} (sm{capability[0]}{capability[1]})"
    if dtype == torch.float32:
        return "computes in bfloat16 or float16 only; set model.dtype: bfloat16"
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
