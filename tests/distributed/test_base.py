"""The base in ZeRO-3 partitions on 1, 2 and 3 ranks, against the file, bitsandbytes and transformers."""

import math

import pytest
import torch

from qvtune.config.schema import RunConfig
from qvtune.doctor.needs import needs_of
from qvtune.storage.safetensors import open_weights
from tests.distributed import reference
from tests.distributed.conftest import Results
from tests.support.lab import Lab

NUM_LAYERS = 2


@pytest.fixture(params=["one", "two", "three"])
def launch(request: pytest.FixtureRequest) -> tuple[str, Results]:
    """Name of a launch, and what its ranks returned."""
    return request.param, request.getfixturevalue(request.param)


@pytest.mark.parametrize(("job", "num_pieces"), [("base", 4 * 7 * NUM_LAYERS), ("unquantized", 7 * NUM_LAYERS)])
def test_every_piece_is_bit_equal_to_that_of_the_whole_tensor(
    launch: tuple[str, Results], job: str, num_pieces: int
) -> None:
    """Codes, absmax, nested absmax and offset of each matrix; and the embedding, the head and the norms as they are."""
    name, results = launch
    for result in results:
        found = result[f"{name}-{job}"]
        assert found["different"] == []
        assert len(found["checked"]) == num_pieces + 2 + 2 * NUM_LAYERS + 1


@pytest.mark.parametrize("job", ["base", "unquantized"])
def test_a_rank_holds_its_share(lab: Lab, launch: tuple[str, Results], job: str) -> None:
    name, results = launch
    total = num_pieces = 0
    for tensor_name, tensor in open_weights(lab.folder / "model").items():
        pieces = [4 * tensor.numel]
        if job == "base" and "_proj" in tensor_name:
            num_blocks = math.ceil(tensor.numel / 64)
            pieces = [math.ceil(tensor.numel / 2), num_blocks, 4 * math.ceil(num_blocks / 256)]
        total, num_pieces = total + sum(pieces), num_pieces + len(pieces)
    for result in results:
        # Each piece is rounded up to a float32 element, once as a whole and once for each rank.
        assert 0 <= result[f"{name}-{job}"]["base_bytes"] - total / len(results) < 8 * num_pieces


@pytest.mark.parametrize("job", ["base", "unquantized"])
def test_the_doctor_knows_the_share(lab: Lab, launch: tuple[str, Results], job: str) -> None:
    """To the byte, from the layout alone."""
    name, results = launch
    section = {"name_or_path": str(lab.folder / "model"), "quantization": "none" if job == "unquantized" else "nf4"}
    config = RunConfig.model_validate(lab.config("run", model=section))
    needs, _ = needs_of(config, lab.folder / "model", len(results), torch.float32)
    assert [result[f"{name}-{job}"]["base_bytes"] for result in results] == [needs.base] * len(results)


@pytest.mark.parametrize(("job", "load"), [("base", reference.four_bit_model), ("unquantized", reference.plain_model)])
def test_the_loss_is_that_of_transformers_own_model(
    lab: Lab, launch: tuple[str, Results], job: str, load: reference.Load
) -> None:
    name, results = launch
    row = reference.token_rows(lab)[0]
    with torch.no_grad():
        expected = float(reference.summed_loss(load(lab.folder / "model"), row)) / int((row.labels != -100).sum())
    for result in results:
        assert result[f"{name}-{job}"]["loss"] == pytest.approx(expected, rel=1e-6)
