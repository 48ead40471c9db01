"""Seconds of an optimizer step: operations, gathers and Python against what GPUs, links and hosts can do."""

from collections import Counter
from dataclasses import dataclass

from qvtune.plan.gpus import GB, Gpu
from qvtune.plan.memory import Costs

# Shares of the data sheets' rates, the best, the worst and the expected one: of matrix products, of operations that
# only move memory, of links. tests/benchmarks/published.py holds them against measured runs.
MATRIX, OTHER, LINK = (0.75, 0.4, 0.6), (0.9, 0.5, 0.75), (0.9, 0.5, 0.75)
# Python and DeepSpeed's hooks, seconds per decoder layer and micro-batch on a 2-core server: with the base whole
# (measured by hand), and sharded, as tests/benchmarks/host_time.py measures it on 8 ranks: 1.19 times the plain model's
# with activation checkpointing, 1.32 without. A GPU that is faster than that waits.
HOST_WHOLE = 9.3e-3
HOST_SHARDED = 1.32 * HOST_WHOLE


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``gpus_per_node`` GPUs each; ``nics_per_node`` adapters of the speed of ``gpu.nic``."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    nics_per_node: int

    @property
    def num_gpus(self) -> int:
        """All of them: the number of ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Gathers:
    """Bytes that an optimizer step gathers into each GPU, and the seconds that each kind of link needs at best."""

    num_bytes: int
    in_node_seconds: float
    between_nodes_seconds: float

    @property
    def seconds(self) -> float:
        """Links work at the same time."""
        return max(self.in_node_seconds, self.between_nodes_seconds)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        bound: no step can be faster: every operation at the full rate of the GPU, gathers hidden or not.
        compute: expected without gathers.
        expected, low, high: with gathers hidden behind computing; ``high`` with poor rates, gathers not hidden, and
            not faster than Python.
        host: of Python alone, on a slow host.
    """

    bound: float
    compute: float
    expected: float
    low: float
    high: float
    host: float


def gathers_of(costs: Costs, cluster: Cluster, micro_batches: int) -> Gathers:
    """Of a step of ``micro_batches`` per rank. Rings: each GPU receives all but its part from its neighbour."""
    gpu, ranks, node = cluster.gpu, cluster.num_gpus, cluster.gpus_per_node
    of_all = costs.gathered * (ranks - 1) // ranks * micro_batches
    of_node = costs.gathered_in_node * (node - 1) // node * micro_batches
    crossing = of_all / (cluster.nics_per_node * gpu.nic * GB) if cluster.nodes > 1 else 0.0
    return Gathers(of_all + of_node, (of_all + of_node) / (gpu.link * GB), crossing)


def step_time(costs: Costs, cluster: Cluster, micro_batches: int, *, sharded: bool) -> StepTime:
    """Of ``micro_batches`` per rank; the step of the optimizer itself (adapters) is left out."""
    gpu, gathers = cluster.gpu, gathers_of(costs, cluster, micro_batches)

    def compute(matrix: float, other: float) -> float:
        return micro_batches * _seconds(costs.operations, gpu.tflops * 1e12 * matrix, gpu.memory_bandwidth * GB * other)

    low, high, expected = (compute(*shares) for shares in zip(MATRIX, OTHER, strict=True))
    host = micro_batches * costs.num_layers * (HOST_SHARDED if sharded else HOST_WHOLE)
    return StepTime(
        bound=max(compute(1, 1), gathers.seconds),
        compute=expected,
        expected=max(expected, gathers.seconds / LINK[2]),
        low=max(low, gathers.seconds / LINK[0]),
        high=max(high + gathers.seconds / LINK[1], host),
        host=host,
    )


def _seconds(operations: Counter[tuple[int, int]], flop_per_second: float, bytes_per_second: float) -> float:
    return sum(
        count * max(flop / flop_per_second, num_bytes / bytes_per_second)
        for (flop, num_bytes), count in operations.items()
    )
