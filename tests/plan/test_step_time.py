"""Seconds from operations and gathers whose answer is known."""

from collections import Counter
from dataclasses import replace

import pytest

from qvtune.plan.gpus import GB, GPUS, Gpu
from qvtune.plan.memory import Costs
from qvtune.plan.step_time import Cluster, gathers_of, step_time

GPU = Gpu(memory=80 * 2**30, tflops=100, memory_bandwidth=1000, link=100, nic=10, source="made up")
TWO_NODES = Cluster(GPU, nodes=2, gpus_per_node=4, nics_per_node=4)


def costs(**changes: int) -> Costs:
    """1 s of matrix products, and 0.5 s of operations that move memory."""
    operations = Counter({(10**13, 1): 10, (0, 10**11): 5})
    values = {"gathered": 0, "gathered_in_node": 0, "persistent": 0, "num_layers": 10, **changes}
    return Costs(peaks={}, operations=operations, **values)


def test_no_step_is_faster_than_data_sheets_allow() -> None:
    time = step_time(costs(), TWO_NODES, micro_batches=3, sharded=False)
    assert time.bound == pytest.approx(3 * 1.5)
    assert time.bound < time.low < time.expected < time.high
    assert time.expected == time.compute == pytest.approx(3 * (1 / 0.6 + 0.5 / 0.75))


def test_gathers_cross_the_border_of_the_node_over_all_adapters() -> None:
    """8 ranks: each receives seven eighths; 4 adapters of 10 GB/s."""
    gathers = gathers_of(costs(gathered=int(80 * GB)), TWO_NODES, micro_batches=2)
    assert gathers.num_bytes == int(2 * 70 * GB)
    assert gathers.in_node_seconds == pytest.approx(1.4) and gathers.between_nodes_seconds == pytest.approx(3.5)
    one_adapter = gathers_of(costs(gathered=int(80 * GB)), replace(TWO_NODES, nics_per_node=1), 2)
    assert one_adapter.between_nodes_seconds == pytest.approx(4 * 3.5)


def test_gathers_within_the_node_cross_nothing() -> None:
    gathers = gathers_of(costs(gathered_in_node=int(80 * GB)), TWO_NODES, micro_batches=1)
    assert (gathers.num_bytes, gathers.between_nodes_seconds) == (int(60 * GB), 0)
    single = gathers_of(costs(gathered=int(80 * GB)), replace(TWO_NODES, nodes=1), micro_batches=1)
    assert single.between_nodes_seconds == 0 and single.in_node_seconds == pytest.approx(0.6)


def test_a_network_that_is_slower_than_computing_is_what_a_step_takes() -> None:
    time = step_time(costs(gathered=int(800 * GB)), TWO_NODES, micro_batches=1, sharded=True)
    assert time.bound == pytest.approx(700 / 40) and time.expected == pytest.approx(700 / 40 / 0.75)


def test_python_can_be_what_a_step_takes() -> None:
    time = step_time(costs(num_layers=10_000), TWO_NODES, micro_batches=1, sharded=True)
    assert time.high == time.host == pytest.approx(122.76)
    assert step_time(costs(num_layers=10_000), TWO_NODES, 1, sharded=False).host == pytest.approx(93)


def test_the_table_of_gpus_says_where_it_is_from() -> None:
    assert {"h100-80", "h200", "a100-80", "a100-40"} <= GPUS.keys()
    for gpu in GPUS.values():
        assert gpu.source and gpu.memory >= 20 * 2**30
        assert gpu.tflops * 1e3 > gpu.memory_bandwidth / 10 and gpu.memory_bandwidth > gpu.link >= gpu.nic
