"""A rank verifies, reads and holds of checkpoints what it must, and no more."""

import math
from pathlib import Path

import pytest

from qvtune.checkpoint.folder import newest
from qvtune.storage.safetensors import read_headers
from tests.distributed.conftest import SHARES, Results
from tests.support.lab import MAX_STEPS, Lab


def checkpoint_of(lab: Lab, name: str) -> Path:
    found = newest(lab.run_dir(name) / "checkpoints")
    assert found is not None and found.name == f"step-{MAX_STEPS:08d}"
    return found


@pytest.fixture(params=SHARES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranks(name: str, request: pytest.FixtureRequest) -> Results:
    results: Results = request.getfixturevalue("two_later" if name.endswith("2") else "three")
    return [result[name] for result in results]


def test_rank_0_alone_verifies_once(lab: Lab, name: str, ranks: Results) -> None:
    num_files = len(list(checkpoint_of(lab, name).iterdir())) - 1  # the manifest
    assert ranks[0]["hashed"] == 2 * num_files, "those of the checkpoint that it resumes from, and of the one it writes"
    assert [rank["hashed"] for rank in ranks[1:]] == [0] * (len(ranks) - 1)


def test_the_ranks_read_each_element_of_the_optimizer_once(lab: Lab, name: str, ranks: Results) -> None:
    tensors = read_headers([checkpoint_of(lab, name) / "optimizer.safetensors"]).values()
    total = sum(tensor.num_bytes for tensor in tensors)
    read = [rank["read"]["optimizer.safetensors"] for rank in ranks]
    assert sum(read) == total
    # ZeRO-2 cuts groups of parameters, with padding at the end, ZeRO-3 each parameter
    assert max(read) <= math.ceil(total / len(ranks)) + 4 * len(tensors) + 1024


def test_matrices_that_zero3_cuts_are_read_once(lab: Lab, name: str, ranks: Results) -> None:
    file = "trained.safetensors" if "full" in name else "adapter_model.safetensors"
    tensors = read_headers([checkpoint_of(lab, name) / file]).values()
    total = sum(tensor.num_bytes for tensor in tensors)
    read = [rank["read"][file] for rank in ranks]
    # Values are masters, of which a rank reads its share. ZeRO-2 cuts groups of parameters, see above.
    share = math.ceil(total / len(ranks)) + 4 * len(tensors) + 1024
    if "zero2" in name or "lora" in name:  # every rank has all values: always, or until DeepSpeed cuts the factors
        assert sum(read) == total * len(ranks) + total and max(read) <= total + share
    else:
        assert sum(read) == 2 * total and max(read) <= 2 * share


def test_rank_0_alone_gathers(lab: Lab, name: str, ranks: Results) -> None:
    tensors = read_headers([checkpoint_of(lab, name) / "optimizer.safetensors"]).values()
    num_parameters, numel = len(tensors) // 2, sum(tensor.numel for tensor in tensors) // 2  # two moments of each
    assert [rank["gathered"] for rank in ranks] == [num_parameters] + [0] * (len(ranks) - 1)
    # Pieces of many tensors are one message: value, master and moments in float32, each rounded up to a whole element.
    assert ranks[0]["largest_bytes"] >= 3 * 4 * numel
    assert max(rank["largest_bytes"] for rank in ranks[1:]) <= 4 * 4 * (math.ceil(numel / len(ranks)) + num_parameters)
