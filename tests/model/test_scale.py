"""What a rank pays for a base, on checkpoints of real shapes with holes instead of weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qvtune.config.schema import ModelSection
from qvtune.model.loader import load_whole
from qvtune.model.nf4 import NF4Linear
from qvtune.model.shard import Shard
from tests.model.one_of_many import load
from tests.model.sparse import (
    BYTES_PER_WEIGHT,
    LLAMA_3_1_70B,
    LLAMA_3_1_405B,
    SMOLLM2_135M,
    llama_shapes,
    make_sparse_folder,
    num_weights,
)
from tests.support.forks import fork_command

MIB = 2**20
RANK, NUM_RANKS = 17, 1024


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "hub_weights", "num_layers"),
    # The sizes that the hub gives: model.safetensors.index.json's total_size / 2. Of the largest every second layer.
    [
        pytest.param(LLAMA_3_1_70B, 70_553_706_496, 80, id="70B"),
        pytest.param(LLAMA_3_1_405B, 405_853_388_800, 63, id="405B"),
    ],
)
def test_one_rank_of_1024_pays_for_its_share(
    tmp_path: Path, config: dict[str, Any], hub_weights: int, num_layers: int
) -> None:
    """Where freed memory is not returned, 240 to 830 MiB stay beside the shard, instead of 120 (405B) and 45 (70B)."""
    assert num_weights(config) == hub_weights
    config = config | {"num_hidden_layers": num_layers}
    folder = make_sparse_folder(tmp_path / "model", config)
    result = tmp_path / "result.json"

    ended = fork_command(
        ["-m", "tests.model.one_of_many", folder, str(RANK), str(NUM_RANKS), result],
        tmp_path / "output",
        timeout=300,
    )

    assert ended.code == 0, ended.output
    found = json.loads(result.read_text())
    share = num_weights(config) * BYTES_PER_WEIGHT / NUM_RANKS
    added = found["peak_rss_bytes"] - found["idle_bytes"]
    print(  # noqa: T201 - the figures are what one runs this for (pytest -s)
        f"\n{num_weights(config):,} weights, rank {RANK} of {NUM_RANKS}: read {found['bytes_read'] / MIB:.1f} MiB, "
        f"share {share / MIB:.1f}; peak above idle {added / MIB:.1f} MiB, of them {found['base_bytes'] / MIB:.1f} "
        f"its shard; {found['seconds']:.1f} s"
    )
    assert found["offsets"] == [0.0] * (7 * num_layers)
    assert found["bytes_read"] <= 1.1 * share
    assert added <= found["base_bytes"] + 180 * MIB


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse_folder(tmp_path_factory.mktemp("models") / "smollm2", SMOLLM2_135M, file_bytes=100_000_000)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_a_rank_holds_its_share_of_the_frozen_bytes(smollm2: Path, num_ranks: int) -> None:
    matrices, others = 0, 0
    shapes = llama_shapes(SMOLLM2_135M)
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if name.endswith("_proj.weight"):
            matrices += numel
        else:
            others += numel * BYTES_PER_WEIGHT
    bits_a_weight = 4 + 8 / 64 + 32 / (64 * 256)  # codes, absmax, nested absmax

    for rank in (0, num_ranks - 1):
        _, report = load(smollm2, Shard(rank, num_ranks))
        total = matrices * bits_a_weight / 8 + others
        assert total / num_ranks <= report.base_bytes <= 1.02 * total / num_ranks + 1024 * len(shapes)
        assert (report.base_bytes * num_ranks - others) * 8 / matrices <= 4.2
        assert report.bytes_read <= 1.02 * num_weights(SMOLLM2_135M) * BYTES_PER_WEIGHT / num_ranks + 1024 * len(shapes)


def test_a_matrix_of_zeros_stays_one(smollm2: Path) -> None:
    """Its blocks have no largest value to divide by."""
    model = load_whole(smollm2, ModelSection(), torch.float32)
    matrices = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(matrices) == 7 * SMOLLM2_135M["num_hidden_layers"]
    assert all(not matrix.matrix().any() for matrix in matrices)
