"""A process group of any size in one process, whose collectives move nothing: for estimates on fake tensors."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Within the context this process is rank 0 of ``world_size`` ranks, for ``process_group`` and for DeepSpeed.

    DeepSpeed's accelerator is the CPU, whatever the machine has; no data is sent, and what is received is undefined.
    """
    import deepspeed
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    deepspeed.ops.__compatible_ops__ = {}  # as in process_group.start
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with patch.dict(os.environ, launcher), patch.object(real_accelerator, "ds_accelerator", CPU_Accelerator()):
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        try:
            deepspeed.init_distributed("gloo")
            yield
        finally:
            deepspeed.comm.destroy_process_group()


def gathered_bytes(collective: Any, arguments: Any) -> Counter[int]:
    """Number of ranks of the group -> bytes that a ``c10d`` operation gathers on this rank; none if it is no gather."""
    if collective is not torch.ops.c10d._allgather_base_.default:
        return Counter()
    output, _, group = arguments[:3]
    return Counter({dist.ProcessGroup.unbox(group).size(): output.nbytes})
