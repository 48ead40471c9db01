"""One process of the collective test; the doctor starts it apart, so that a network that hangs can be left to hang.

    python -m qvtune.cluster.doctor.collective ADDRESS PORT RANK WORLD_SIZE LOCAL_RANK SECONDS

Rank 0 prints one line of JSON. Tested by value: every rank contributes numbers of its own.
"""

import datetime
import json
import sys
import time

import torch
import torch.distributed as dist

_NUMEL = 4 << 20  # float32: 16 MiB from each rank
_ROUNDS = 3


def main(address: str, port: int, rank: int, world_size: int, local_rank: int, seconds: int) -> None:
    """All-reduce and all-gather; raises where a value is not what the ranks have contributed."""
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    own = torch.arange(_NUMEL, device=device) % 1024
    # Sums of small integers: exact in float32 in any order.
    expected_sum = own * world_size + world_size * (world_size - 1) // 2
    parts = [torch.empty(_NUMEL, device=device) for _ in range(world_size)]
    reduce_seconds = gather_seconds = 0.0
    for round_number in range(_ROUNDS + 1):
        values = (own + rank).float()
        started = _now(on_gpus)
        dist.all_reduce(values)
        between = _now(on_gpus)
        dist.all_gather(parts, (own + rank).float())
        if round_number:  # the first one connects
            reduce_seconds += between - started
            gather_seconds += _now(on_gpus) - between
        if not torch.equal(values, expected_sum.float()):
            raise ValueError("all-reduce gave wrong sums")
        if any(not torch.equal(part, (own + other).float()) for other, part in enumerate(parts)):
            raise ValueError("all-gather gave wrong values")
    dist.barrier()
    if rank == 0:
        # What crosses each rank's link, so that the figure does not depend on the number of ranks (nccl-tests' busbw).
        share = _NUMEL * 4 * _ROUNDS * (world_size - 1)
        reduced, gathered = 2 * share / world_size / reduce_seconds, share / gather_seconds
        figures = {"backend": dist.get_backend(), "all_reduce": reduced, "all_gather": gathered}
        sys.stdout.write(json.dumps(figures) + "\n")
    dist.destroy_process_group()


def _now(on_gpus: bool) -> float:
    if on_gpus:
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    _address, *_numbers = sys.argv[1:]
    main(_address, *map(int, _numbers))
