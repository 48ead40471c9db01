"""Runs that must train alike: by the number of ranks, by how a step is split, by where things are kept."""

import json

import pytest
from safetensors.torch import load_file

from tests.distributed import reference
from tests.distributed.conftest import EQUIVALENT, Results
from tests.support.lab import MAX_GRAD_NORM, MAX_STEPS, Lab

# float32 sums in another order: 1e-7 a step, a little more after AdamW has divided small numbers by small numbers
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def plain(lab: Lab, two: Results) -> list[float]:
    """Losses of the run on 2 ranks that all others are compared with."""
    assert [result["plain"] for result in two] == [{"code": 0}] * 2
    return lab.losses("plain")


def test_it_equals_an_independent_training_loop(lab: Lab, plain: list[float]) -> None:
    losses, grad_norms = reference.train(lab, reference.adapted_model(lab.folder / "model"))
    assert plain == pytest.approx(losses, rel=ROUNDING)
    assert lab.grad_norms("plain") == pytest.approx(grad_norms, rel=1e-4)  # a norm of differences of the above
    assert min(grad_norms) < MAX_GRAD_NORM < max(grad_norms)  # some steps are clipped, some are not


@pytest.mark.parametrize(("name", "quantized"), [("full", True), ("full-unquantized", False)])
def test_training_the_matrices_equals_an_independent_loop(lab: Lab, two: Results, name: str, quantized: bool) -> None:
    assert [result[name] for result in two] == [{"code": 0}] * 2
    model = reference.own_parameters_model(lab.folder / "model", quantized=quantized)
    losses, grad_norms = reference.train(lab, model)
    assert lab.losses(name) == pytest.approx(losses, rel=ROUNDING)
    assert lab.grad_norms(name) == pytest.approx(grad_norms, rel=1e-4)
    checkpoint = lab.run_dir(name) / "checkpoints" / "latest"
    assert not (checkpoint / "adapter_config.json").exists()
    stored = load_file(checkpoint / "trained.safetensors")
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == trained.keys()
    for key, parameter in trained.items():
        # AdamW moves by the sign of a gradient that is nothing but rounding as far as by any other
        assert (stored[key] - parameter).abs().mean() < 1e-4, key


def test_training_the_matrices_elsewhere(lab: Lab, one: Results, two: Results, three: Results) -> None:
    """With ZeRO-2, on one rank and on three."""
    for name, results in (("full-zero2", two), ("full-on-one", one), ("full-on-three", three)):
        assert [result[name] for result in results] == [{"code": 0}] * len(results)
        assert lab.losses(name) == pytest.approx(lab.losses("full"), rel=ROUNDING)


@pytest.mark.parametrize("launch", ["one", "three"])
def test_the_number_of_ranks_does_not_matter(
    lab: Lab, plain: list[float], launch: str, request: pytest.FixtureRequest
) -> None:
    results = request.getfixturevalue(launch)
    assert [result[launch] for result in results] == [{"code": 0}] * len(results)
    assert lab.losses(launch) == pytest.approx(plain, rel=ROUNDING)


def test_two_rows_at_a_time_on_one_rank(lab: Lab, plain: list[float], one: Results) -> None:
    assert one[0]["one-micro_batch"] == {"code": 0}
    assert lab.losses("one-micro_batch") == pytest.approx(plain, rel=ROUNDING)


@pytest.mark.parametrize("name", [*EQUIVALENT, "zero3_hpz", "varlen"])
def test_equivalent_settings(lab: Lab, two: Results, plain: list[float], name: str) -> None:
    assert [result[name] for result in two] == [{"code": 0}] * 2
    assert lab.losses(name) == pytest.approx(plain, rel=ROUNDING)


def test_auto_is_zero3_on_cpus(lab: Lab, plain: list[float], two: Results) -> None:
    assert [result["auto"] for result in two] == [{"code": 0}] * 2
    assert lab.losses("auto") == plain
    auto, named = (json.loads((lab.run_dir(name) / "deepspeed.json").read_text()) for name in ("auto", "plain"))
    assert auto == named
    assert "deepspeed: auto\n" in (lab.run_dir("auto") / "config.yaml").read_text()


def test_the_same_run_again_gives_the_same_numbers(lab: Lab, plain: list[float], two_later: Results) -> None:
    assert lab.losses("again") == plain
    assert lab.grad_norms("again") == lab.grad_norms("plain")


def test_the_quantized_folder_trains_the_same_to_the_bit(lab: Lab, plain: list[float], two: Results) -> None:
    assert [result["nf4_folder"] for result in two] == [{"code": 0}] * 2
    assert lab.losses("nf4_folder") == plain
    read, of_source = (lab.events(name, "base_loaded")[0]["bytes_read"] for name in ("nf4_folder", "plain"))
    assert read < 0.65 * of_source  # a third of this tiny model is embeddings, which stay as they are


def test_dropout_is_on_and_differs_between_steps(lab: Lab, plain: list[float]) -> None:
    assert lab.losses("dropout") != pytest.approx(plain, rel=1e-3)


def test_it_learns_and_evaluates(lab: Lab, plain: list[float]) -> None:
    evaluations = lab.events("plain", "eval")
    assert [entry["step"] for entry in evaluations] == [0, 2, 4, MAX_STEPS]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
