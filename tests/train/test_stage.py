"""What ``deepspeed: auto`` chooses, from which facts, and that the run then has it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qvtune.config.zero_stage import GIB
from qvtune.distributed import process_group
from qvtune.train import stage
from qvtune.train.checks import Checks
from qvtune.train.stage import Ranks, choose_deepspeed, gpus_here, resolve_or_choose
from qvtune.train.step_memory import Gpus, StepMemory
from tests.support.fake_engine import run_of

# Llama 3 70B with activation checkpointing, in GiB.
LARGE = StepMemory(37 * GIB, 3 * GIB, GIB // 10, GIB // 5, 8 * GIB)


@pytest.mark.parametrize(
    ("memory", "per_node", "nodes", "file"),
    [
        (79, 8, 1, "zero2.json"),
        (79, 8, 8, "zero2.json"),
        (39, 8, 8, "zero3_hpz.json"),
        (39, 8, 1, "zero3.json"),  # on one node there is nothing to be held twice
        (39, 1, 8, "zero3.json"),
        (23, 8, 8, "zero3_hpz.json"),
        (15, 4, 2, "zero3.json"),  # does not fit
    ],
)
def test_the_choice(memory: int, per_node: int, nodes: int, file: str) -> None:
    chosen, reason = choose_deepspeed(LARGE, Gpus(memory * GIB, per_node, nodes), elsewhere=False)
    assert chosen == file
    assert reason.startswith(f"deepspeed: auto: {file}") and "\n" not in reason
    assert reason.endswith(f"({nodes} x {per_node} GPUs of {memory}.0 GiB)")
    if memory == 39 and (per_node, nodes) == (8, 8):
        assert "GPUs 0.6 GiB and once more within each node 4.6 GiB" in reason
        assert "all else 8.1 GiB" in reason and "zero2.json needs 45.1 GiB" in reason
    assert ("may not fit" in reason) == (memory == 15)
    assert ("zero3_offload.json" in reason) == (memory == 15)


def test_more_ranks_share_the_state_of_the_optimizer() -> None:
    """Trained matrices of 10 GiB: 60 GiB of masters and moments."""
    full = StepMemory(2 * GIB, GIB, 20 * GIB, 60 * GIB, GIB)
    assert not full.choose(Gpus(39 * GIB, 1, 1))[1].startswith("zero2.json: ")
    assert full.choose(Gpus(39 * GIB, 8, 1))[1].startswith("zero2.json: base whole 2.0 GiB, nothing is gathered, all")


def test_cpus_shard_the_base() -> None:
    assert choose_deepspeed(LARGE, None, elsewhere=False) == (
        "zero3.json",
        "deepspeed: auto: zero3.json, as always on CPUs",
    )
    assert "chosen when the run starts" in choose_deepspeed(LARGE, None, elsewhere=True)[1]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(0, 2), (0, 2)], None),
        ([(80, 2), (40, 2), (80, 2), (80, 2)], Gpus(40, 2, 2)),
        ([(80, 2), (80, 2), (80, 1)], Gpus(80, 1, 3)),  # a node has fewer: the base is not held once per node
        ([(80, 1), (0, 1)], None),  # a rank without a GPU
    ],
)
def test_all_ranks_see_the_same_gpus(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[int, int]], expected: Gpus | None
) -> None:
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: found)
    assert gpus_here() == expected


def test_this_rank_tells_the_others_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: told.append(own) or [own])  # type: ignore[func-returns-value]
    monkeypatch.setattr(process_group, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    gpus_here()
    assert told == [(80 * GIB, 8)]


@pytest.mark.parametrize(
    ("gpus", "expected_stage", "node"),
    [(Gpus(79 * GIB, 2, 2), 2, None), (Gpus(44 * GIB, 2, 2), 3, 2), (Gpus(39 * GIB, 4, 1), 3, None), (None, 3, None)],
)
def test_the_run_has_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, gpus: Gpus | None, expected_stage: int, node: int | None
) -> None:
    """Four ranks; hpZ with as many as a node has."""
    memory = StepMemory(37 * GIB, 3 * GIB, GIB // 10, GIB // 5, 4 * GIB)
    monkeypatch.setattr(process_group, "world_size", lambda: 4)
    monkeypatch.setattr(process_group, "on_main", lambda build: build())
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: [own])
    monkeypatch.setattr(process_group, "ranks_of_host", lambda: 2)
    monkeypatch.setattr(stage, "gpus_here", lambda: gpus)
    run = run_of(4, deepspeed="auto")
    resolved, reason = resolve_or_choose(run, torch.bfloat16, memory, Ranks(4, None), Checks())
    assert resolved is not None and reason.startswith("\ndeepspeed: auto: zero")
    assert resolved["zero_optimization"]["stage"] == expected_stage
    assert resolved["zero_optimization"].get("zero_hpz_partition_size") == node


def test_a_file_that_was_named_stays() -> None:
    found, reason = resolve_or_choose(
        run_of(4, deepspeed="zero2.json"), torch.bfloat16, LARGE, Ranks(4, True), Checks()
    )
    assert found is not None and found["zero_optimization"]["stage"] == 2 and not reason
