"""Test of all-reduce and all-gather between the nodes, by value and by time, in processes that can be killed."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from qvtune.distributed.bandwidth import measure_bandwidth
from qvtune.doctor.findings import Finding
from qvtune.doctor.rendezvous import Membership

CHECK = "collective"
_REMEDY = "NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME must name the interface between the nodes"


class Workers:
    """One process per GPU of this node, or a single one; a context manager that kills them at its end.

    They are forked, so that torch is imported only once. Neither threads nor CUDA survive a fork: create this before
    threads are started and before CUDA is used.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.number = max(1, torch.cuda.device_count())
        self._processes, self._pipes = [], []
        for local_rank in range(self.number):
            own_end, worker_end = context.Pipe()
            process = context.Process(target=_run_task, args=(worker_end, local_rank), daemon=True)
            process.start()
            worker_end.close()
            self._processes.append(process)
            self._pipes.append(own_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def try_collective(self, membership: Membership, master: str, node: int, deadline: float) -> list[Finding]:
        """Run the test with the workers of all member nodes; no finding if that is a single worker."""
        num_local = min(member.ranks for member in membership.members)  # other checks report differing numbers
        world_size = num_local * len(membership.members)
        if world_size == 1:
            return []
        first_rank = membership.nodes.index(node) * num_local
        seconds = max(1.0, deadline - time.monotonic() - 2)  # gloo reports its timeout before the processes are killed
        for local_rank, pipe in enumerate(self._pipes[:num_local]):
            pipe.send((f"tcp://{master}:{membership.port}", first_rank + local_rank, world_size, seconds))
        answers = [_answer(pipe, deadline) for pipe in self._pipes[:num_local]]
        problems = dict.fromkeys(answer for answer in answers if isinstance(answer, str))
        if problems:
            return [Finding(CHECK, "fail", problem, _REMEDY) for problem in problems]
        return [Finding(CHECK, "ok", f"correct values; {_rates(answers[0])} ({world_size} ranks)")]


def _answer(pipe: Connection, deadline: float) -> Any:
    """What the worker has measured, or a string: why it has not."""
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return "all-reduce and all-gather did not finish in time"
    try:
        return pipe.recv()
    except EOFError:
        return "a worker process died"


def _rates(figures: dict[str, Any]) -> str:
    reduced, gathered = figures["all_reduce"] / 1e9, figures["all_gather"] / 1e9
    return f"all-reduce {reduced:.2f} GB/s, all-gather {gathered:.2f} GB/s with {figures['backend']}"


def _run_task(pipe: Connection, local_rank: int) -> None:
    """The worker process: wait for one task, run it, send the result or the error."""
    try:
        address, rank, world_size, seconds = pipe.recv()
    except EOFError:  # the doctor has ended without a task
        return
    try:
        pipe.send(measure_bandwidth(address, rank, world_size, local_rank, seconds))
    except Exception as error:  # noqa: BLE001  # any error is what the doctor is to report
        pipe.send(str(error).strip().partition("\n")[0] or type(error).__name__)
