"""Which DeepSpeed configuration suits a base and a cluster: arithmetic on bytes, no libraries."""

from dataclasses import dataclass
from typing import Literal

StageFile = Literal["zero2.json", "zero3.json", "zero3_hpz.json"]
GIB = 2**30
RESERVED = 2 * GIB  # of a GPU: CUDA context, NCCL's buffers, libraries
USABLE = 0.9  # of the rest: the caching allocator leaves holes


@dataclass(frozen=True)
class StageChoice:
    """A file of ds_configs/, why it was chosen, and whether the run then fits into the memory of a GPU."""

    file: StageFile
    reason: str
    fits: bool


def choose_stage(
    base_bytes: int, gathered_bytes: int, other_bytes: int, gpu_bytes: int, gpus_per_node: int, nodes: int
) -> StageChoice:
    """The configuration with the least communication that fits: whole base, base sharded per node, base sharded.

    Args:
        base_bytes: frozen parameters of the whole model as they are stored (NF4, and the rest in the compute dtype).
        gathered_bytes: most that is gathered at a time where the base is sharded.
        other_bytes: everything else on one GPU: adapters and their state, activations, logits.
        gpu_bytes: memory of one GPU.
    """
    room = usable_bytes(gpu_bytes)
    num_gpus = nodes * gpus_per_node
    shard = -(-base_bytes // num_gpus)
    needs: dict[StageFile, tuple[int, str]] = {
        "zero2.json": (base_bytes + other_bytes, f"base whole {_gib(base_bytes)}, nothing is gathered")
    }
    if nodes > 1 and gpus_per_node > 1:
        second = -(-base_bytes // gpus_per_node)
        needs["zero3_hpz.json"] = (
            shard + second + gathered_bytes + other_bytes,
            f"base sharded over all {num_gpus} GPUs {_gib(shard)} and once more within each node {_gib(second)}, so "
            f"that gathers stay within the node; gathered at a time {_gib(gathered_bytes)}",
        )
    needs["zero3.json"] = (
        shard + gathered_bytes + other_bytes,
        f"base sharded over {num_gpus} GPUs {_gib(shard)}, gathered at a time {_gib(gathered_bytes)}",
    )
    refused: list[str] = []
    for file, (need, what) in needs.items():
        if need <= room:
            reason = f"{file}: {what}, all else {_gib(other_bytes)}: {_gib(need)} of {_gib(room)} usable"
            return StageChoice(file, "; ".join([reason, *refused]), fits=True)
        refused.append(f"{file} needs {_gib(need)}")
    return StageChoice("zero3.json", f"{'; '.join(refused)}; usable: {_gib(room)}", fits=False)


def usable_bytes(gpu_bytes: int) -> int:
    """Bytes of a GPU that tensors can have."""
    return int((gpu_bytes - RESERVED) * USABLE)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
