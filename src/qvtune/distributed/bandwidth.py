"""Test of all-reduce and all-gather, by value and by time, for the doctor."""

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

_NUMEL = {True: 16 << 20, False: 1 << 20}  # float32 elements per rank, on GPUs and on CPUs: 64 MiB, 4 MiB
_ROUNDS = 3


def measure_bandwidth(address: str, rank: int, world_size: int, local_rank: int, seconds: float) -> dict[str, Any]:
    """Measure both collectives in a process group of their own, which this joins and leaves.

    Returns the backend, and the bus bandwidth of each collective as nccl-tests define it: bytes per second and link,
    independent of the number of ranks. A collective waits at most ``seconds``. Raises ValueError for wrong values.
    """
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if on_gpus else "gloo", datetime.timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=timeout)
    numel = _NUMEL[on_gpus]
    own = torch.arange(numel, device=device) % 1024
    sums = own * world_size + world_size * (world_size - 1) // 2  # of small integers: exact in float32, in any order
    parts = [torch.empty(numel, device=device) for _ in range(world_size)]
    reduce_seconds = gather_seconds = 0.0
    for round_number in range(_ROUNDS + 1):
        values, mine = (own + rank).float(), (own + rank).float()
        started = _now(on_gpus)
        dist.all_reduce(values)
        between = _now(on_gpus)
        dist.all_gather(parts, mine)
        if round_number:  # the first round connects
            reduce_seconds += between - started
            gather_seconds += _now(on_gpus) - between
        _require(values, sums, "all-reduce")
        for other, part in enumerate(parts):
            _require(part, own + other, "all-gather")
    dist.barrier()
    dist.destroy_process_group()
    share = numel * 4 * _ROUNDS * (world_size - 1)
    reduced, gathered = 2 * share / world_size / reduce_seconds, share / gather_seconds
    return {"backend": backend, "all_reduce": reduced, "all_gather": gathered}


def _require(found: torch.Tensor, expected: torch.Tensor, operation: str) -> None:
    if not torch.equal(found, expected.float()):
        raise ValueError(f"{operation} gave wrong values")


def _now(on_gpus: bool) -> float:
    if on_gpus:
        torch.cuda.synchronize()
    return time.monotonic()
