"""The process group of all ranks: the only module that uses torch.distributed and reads the rank variables.

``deepspeed``, torchrun and ``srun`` set these variables; without them (plain ``python``) there is one rank.
"""

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qvtune.distributed import heartbeat
from qvtune.distributed.ports import any_free_port
from qvtune.errors import StopRequested, UserError
from qvtune.system import heavy_imports

Value = TypeVar("Value")

_POLL_SECONDS = 0.5  # between requests to the store of rank 0
_meetings = itertools.count()  # equal on all ranks, which wait for each other equally often


def start() -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs). Call once, before anything imports DeepSpeed.

    A collective that waits longer than QVTUNE_TIMEOUT_SECONDS (default 1800) for another rank fails and ends the run;
    a broken network is not noticed otherwise. Raises UserError if the variable is not a number of seconds, and on rank
    0 if the port is taken, by another run for example.
    """
    waits_at_most = timeout()
    _share_cores()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(any_free_port())
    os.environ.setdefault("LOCAL_RANK", "0")
    with heavy_imports():
        import deepspeed
    # Of its optional operators the first start would compile one for tensor-parallel inference, which takes a minute.
    deepspeed.ops.__compatible_ops__ = {}
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout=waits_at_most)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']}, at which ranks meet, is in use, perhaps by another run here; "
            "give another: deepspeed --master_port N launch/train.py ... (torchrun: --master-port N)"
        ) from error


def timeout() -> timedelta:
    """How long a collective waits for another rank: QVTUNE_TIMEOUT_SECONDS. Raises UserError if that is no number."""
    text = os.environ.get("QVTUNE_TIMEOUT_SECONDS", "1800")
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"QVTUNE_TIMEOUT_SECONDS (slurm/cluster.env): {text!r} is not a number of seconds, e.g. 1800")
    return timedelta(seconds=int(text))


def nan_check() -> str | None:
    """The value of TORCH_NCCL_NAN_CHECK, with which torch raises an error where NCCL sends NaN; None if that is off."""
    value = os.environ.get("TORCH_NCCL_NAN_CHECK", "0")
    return None if value.lower() in ("0", "f", "false", "n", "no") else value


def _share_cores() -> None:
    """Divide the cores among the ranks of this host: more threads than cores made a step 15 times slower.

    On GPU machines too: there the CPU quantizes the base while it is loaded.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_host()))


def stop() -> None:
    """Barrier, then leave the process group: the launcher kills the remaining ranks at the first exit with an error."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process; before ``start`` that of the launcher's variable, or 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; before ``start`` that of the launcher's variable, or 1."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return rank() == 0


def ranks_of_host() -> int:
    """Number of ranks on this host, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over the ranks, in float64, in one collective."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(*values: float) -> list[float]:
    """The largest of each value over the ranks, in one collective."""
    return _reduce(values, dist.ReduceOp.MAX)


def max_over_hosts(*values: float) -> list[float]:
    """The largest of each value over the ranks, in one collective.

    Over gloo and host memory even where the other collectives use NCCL: a tensor on the GPU would have to wait for
    all kernels queued there. Costs one round trip between the hosts.
    """
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group())
    result: list[float] = largest.tolist()
    return result


@lru_cache
def _host_group() -> Any:
    """A gloo group of all ranks; the first call is collective."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout())


def announce(name: str, text: str) -> None:
    """Store ``text`` where any rank can read it without a collective. Thread-safe."""
    if dist.is_initialized() and world_size() > 1:
        try:
            _store().set(name, text)
        except dist.DistError as error:  # rank 0 serves the store and has exited: every collective fails as well
            warnings.warn(f"cannot announce {name}: {error}", stacklevel=2)


def announced(name: str) -> str | None:
    """The text that some rank has stored under this name, or None."""
    if not dist.is_initialized() or world_size() == 1 or not _store().check([name]):
        return None
    text: str = _store().get(name).decode()
    return text


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _reduce(values: tuple[float, ...], operation: Any) -> list[float]:
    totals = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(totals, operation)
    result: list[float] = totals.tolist()
    return result


def all_gather_tensor(own: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, in rank order; shapes must be equal."""
    if world_size() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return parts


def start_all_gather(whole: torch.Tensor, own: torch.Tensor) -> Any:
    """Start to fill ``whole`` with the tensors of all ranks, in rank order; returns what is to be waited for.

    1-D; ``own`` may be this rank's part of ``whole``.
    """
    import deepspeed.comm  # which can log what it sends (comms_logger)

    return deepspeed.comm.all_gather_into_tensor(whole, own, async_op=True)


def gather_on_main(own: torch.Tensor, numels: Sequence[int]) -> torch.Tensor | None:
    """The 1-D tensors of all ranks one after the other, on rank 0; None on other ranks. Collective.

    ``own`` is in host memory and has ``numels[rank]`` elements. Ranks with none send nothing, and no rank but 0 holds
    more than its own.
    """
    assert own.numel() == numels[rank()], (own.shape, numels)
    if not is_main():
        if own.numel():
            dist.send(own.contiguous().view(torch.uint8), 0, group=_host_group())
        return None
    whole = own.new_empty(sum(numels))
    pieces = whole.split(list(numels))
    pieces[0].copy_(own)
    requests = [
        dist.irecv(piece.view(torch.uint8), source, group=_host_group())
        for source, piece in enumerate(pieces)
        if source and piece.numel()
    ]
    for request in requests:
        assert request is not None  # only where this rank is not in the group
        request.wait()
    return whole


def all_gather_object(own: Any) -> list[Any]:
    """The objects of all ranks, in rank order; of this process alone where there is no process group."""
    if not dist.is_initialized():
        assert world_size() == 1, "call start() first"
        return [own]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    return parts


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank; this process's own where there is no process group."""
    if not dist.is_initialized():
        assert world_size() == 1, "call start() first"
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def raise_on_all_ranks(*, however_long: bool = False) -> Iterator[None]:
    """Raise a UserError or StopRequested of any rank inside the block on all ranks, so that none waits for another.

    No collectives inside: a rank with an error would not take part in them. Any other exception propagates at once.
    ``however_long``: the block may take longer than a collective waits.
    """
    own: tuple[str, ...] = ()
    stop = None
    try:
        yield
    except UserError as error:
        own = error.problems
    except StopRequested as request:
        stop = str(request)
    if however_long:
        _await_all_ranks()
    reports = all_gather_object((own, stop))
    problems = list(dict.fromkeys(problem for report, _ in reports for problem in report))
    if problems:
        raise UserError(problems)
    if stops := [text for _, text in reports if text is not None]:
        raise StopRequested(stops[0])


def _await_all_ranks() -> None:
    """Wait without a collective, which would end the run after QVTUNE_TIMEOUT_SECONDS."""
    if world_size() > 1:
        name, seconds = f"qvtune/arrived-{next(_meetings)}", 0.01
        _store().add(name, 1)
        while _store().add(name, 0) < world_size():
            heartbeat.beat()
            time.sleep(seconds)
            seconds = min(2 * seconds, _POLL_SECONDS)


def on_main(build: Callable[[], Value]) -> Value:
    """What ``build()`` returns on rank 0, on every rank; its UserError or StopRequested is raised on all ranks."""
    value: Any = None
    with raise_on_all_ranks():
        if is_main():
            value = build()
    result: Value = broadcast_object(value)
    return result


def once_per_host(build: Callable[[], Value]) -> Value:
    """Call ``build()`` on local rank 0 of each host first, then on its other ranks, which find the result in the cache.

    A UserError or StopRequested of one rank is raised on all ranks; no collectives inside.
    """
    for first in (True, False):
        with raise_on_all_ranks(however_long=True):
            if (local_rank() == 0) is first:
                value = build()
    return value
