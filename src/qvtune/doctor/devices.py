"""Checks of this node's GPUs, memory and attention kernels."""

import re
from collections.abc import Mapping

import torch

from qvtune.config.schema import ModelSection
from qvtune.distributed.allocation import Allocation
from qvtune.doctor.findings import Finding
from qvtune.doctor.needs import Needs
from qvtune.errors import UserError
from qvtune.model.attention import choose_attention, choose_dtype
from qvtune.system import free_memory


def check_gpus(allocation: Allocation, environment: Mapping[str, str], num_cuda: int) -> list[Finding]:
    """Compare the GPUs requested, granted by Slurm, visible, and seen by torch (``num_cuda``)."""
    requested, granted = allocation.gpus_requested or 0, allocation.gpus_granted
    visible = _visible(environment)
    problems = []
    if granted is not None and granted < requested:
        problems.append(
            (f"Slurm has granted {granted} of the {requested} requested", "scontrol show node: Gres and AllocTRES")
        )
    if visible is not None and len(set(visible)) != len(visible):
        problems.append(
            (f"CUDA_VISIBLE_DEVICES={','.join(visible)} names a GPU twice", "do not set it in a shell profile")
        )
    expected = requested if granted is None else max(requested, granted)
    hidden = allocation.on_cpus and not visible  # intended
    if visible is not None and not hidden and len(visible) < expected and (granted is None or granted >= requested):
        clash = f"CUDA_VISIBLE_DEVICES={','.join(visible)} leaves {len(visible)} of {expected} visible"
        problems.append((clash, "remove it from the shell profile or the job script; Slurm sets it"))
    if requested > num_cuda and not problems and not allocation.on_cpus:
        problems.append((f"torch sees {num_cuda} of the {requested} requested", _why_no_cuda()))
    if problems:
        return [Finding("GPUs", "fail", detail, remedy) for detail, remedy in problems]
    if requested > num_cuda:
        detail = f"{requested} granted; {allocation.processes} processes on CPUs, as QVTUNE_PROCS_PER_NODE says"
        return [Finding("GPUs", "note", detail, "unset it to train on GPUs")]
    return [Finding("GPUs", "ok", f"{num_cuda} seen, {requested or 'none'} requested")]


def _visible(environment: Mapping[str, str]) -> list[str] | None:
    value = environment.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [name for name in re.split(r"\s*,\s*", value.strip()) if name]


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "torch is a CPU build: make env TORCH_BACKEND=cu126, or set QVTUNE_PROCS_PER_NODE to train on CPUs"
    return f"torch is built for CUDA {torch.version.cuda}: compare with nvidia-smi on this node"


def check_attention(model: ModelSection) -> tuple[list[Finding], dict[str, str]]:
    """The attention kernels that this node would use; they must be the same on all nodes."""
    dtype, _ = choose_dtype(model.dtype)
    try:
        chosen, reason = choose_attention(model.attention, dtype)
    except UserError as error:
        return [Finding("attention", "fail", problem) for problem in error.problems], {"attention": "none"}
    return [Finding("attention", "ok", f"{chosen} in {dtype} ({reason})")], {"attention": f"{chosen} in {dtype}"}


def check_memory(allocation: Allocation, needs: Needs | None, on_gpus: bool) -> list[Finding]:
    """Compare free memory of host and GPUs with the needs of this node's ranks, activations excluded."""
    free = free_memory()
    if needs is None:
        return [Finding("memory", "ok", f"{free / 1e9:.1f} GB free; needs unknown without a base")]
    host, device = needs.split(on_gpus)
    findings = [_compare("memory", free, allocation.processes * host, f"{allocation.processes} ranks need")]
    if on_gpus:
        free_on_device = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        findings.append(_compare("GPU memory", free_on_device, device, "a rank needs"))
    return findings


def _compare(check: str, free: int, needed: int, what: str) -> Finding:
    detail = f"{free / 1e9:.1f} GB free, {what} {needed / 1e9:.1f} GB and activations"
    if free >= needed:
        return Finding(check, "ok", detail)
    return Finding(
        check, "fail", detail, "use more nodes or ranks, which share the base; or request more memory (--mem=0)"
    )
