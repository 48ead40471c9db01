"""All-reduce and all-gather among the nodes, tested by value and timed, in processes that can be left to hang."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from qvtune.distributed.bandwidth import measure_bandwidth
from qvtune.doctor.findings import Finding
from qvtune.doctor.meeting import Roll

CHECK = "collective"
_REMEDY = "NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME must name the interface between the nodes"


class Ranks:
    """One process for each GPU of this node, or one. They are forked from this one: torch is imported once only.

    Make it before threads are started and before CUDA is used, neither of which outlives a fork.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.number = max(1, torch.cuda.device_count())
        self._processes, self._pipes = [], []
        for local_rank in range(self.number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_wait_for_task, args=(theirs, local_rank), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def try_collective(self, roll: Roll, master: str, node: int, deadline: float) -> list[Finding]:
        """Among all ranks of the nodes present; nothing to find where that is one rank."""
        number = min(peer.ranks for peer in roll.peers)  # differing numbers are reported elsewhere
        world_size = number * len(roll.peers)
        if world_size == 1:
            return []
        first = [peer.node for peer in roll.peers].index(node) * number
        seconds = max(1.0, deadline - time.monotonic() - 2)  # gloo's own message comes before the processes are ended
        for local, pipe in enumerate(self._pipes[:number]):
            pipe.send((f"tcp://{master}:{roll.port}", first + local, world_size, seconds))
        answers = [_answer(pipe, deadline) for pipe in self._pipes[:number]]
        problems = dict.fromkeys(answer for answer in answers if isinstance(answer, str))
        if problems:
            return [Finding(CHECK, "fail", problem, _REMEDY) for problem in problems]
        return [Finding(CHECK, "ok", f"right values; {_rates(answers[0])} ({world_size} ranks)")]

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        """Ended with the block, whatever they are waiting for then."""
        ranks = cls()
        try:
            yield ranks
        finally:
            for process in ranks._processes:
                process.kill()
                process.join()


def _answer(pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return "all-reduce and all-gather had not ended in time"
    try:
        return pipe.recv()
    except EOFError:
        return "a process of it has died"


def _rates(figures: dict[str, Any]) -> str:
    reduced, gathered = figures["all_reduce"] / 1e9, figures["all_gather"] / 1e9
    return f"all-reduce {reduced:.2f} GB/s, all-gather {gathered:.2f} GB/s by {figures['backend']}"


def _wait_for_task(pipe: Connection, local_rank: int) -> None:
    try:
        address, rank, world_size, seconds = pipe.recv()
    except EOFError:  # there is none: the doctor has ended
        return
    try:
        pipe.send(measure_bandwidth(address, rank, world_size, local_rank, seconds))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what the doctor is to report
        pipe.send(str(error).strip().partition("\n")[0] or type(error).__name__)
