"""Runs on a weighted mixture of three sources, with two sets for evaluation."""

import json

import pytest

from tests.distributed.conftest import Results
from tests.support.lab import Lab


def test_the_order_is_the_same_on_any_number_of_ranks(lab: Lab, one: Results, two: Results, three: Results) -> None:
    for name in ("mixture-on-one", "mixture-on-three"):
        for found, expected in zip(lab.events(name, "step"), lab.events("mixture", "step"), strict=True):
            assert (found["tokens"], found["label_tokens"]) == (expected["tokens"], expected["label_tokens"])
        # the order of float32 sums over ranks is another
        assert lab.losses(name) == pytest.approx(lab.losses("mixture"), rel=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(lab: Lab, two_later: Results) -> None:
    assert [result["mixture-continued"] for result in two_later] == [{"code": 0}] * 2
    assert len(lab.events("mixture-stopped", "run_start")) == 2
    assert lab.losses("mixture-stopped") == lab.losses("mixture")


def test_other_weights_are_refused(two_later: Results) -> None:
    for result in two_later:
        first, second, *_ = result["mixture-stopped"]["message"].splitlines()
        assert first == "data.train.1.weight: 0.2 now, 0.3 in the checkpoint"
        assert second == "data.train.2.weight: 0.3 now, 0.2 in the checkpoint"


def test_each_set_has_a_loss_and_the_first_decides(lab: Lab, two: Results) -> None:
    evaluations = lab.events("mixture", "eval")
    for one in evaluations:
        assert list(one["sets"]) == ["few", "both"]
        assert one["loss"] == one["sets"]["few"]["loss"] != one["sets"]["both"]["loss"]
    assert evaluations[0]["loss"] == lab.events("plain", "eval")[0]["loss"], "the same rows before the first step"
    state = json.loads((lab.run_dir("mixture") / "checkpoints/latest/trainer_state.json").read_text())
    decides = {int(step): metrics["loss"] for step, metrics in state["evaluations"].items()}
    assert decides.items() <= {one["step"]: one["loss"] for one in evaluations}.items() and decides


def test_the_record_says_what_of_each_source_is_trained_on(lab: Lab, two: Results) -> None:
    data = json.loads((lab.run_dir("mixture") / "data.json").read_text())
    assert list(data) == ["data.train", "data.eval.few", "data.eval.both"]
    num_visited = 6 * len(lab.events("mixture", "step"))
    visits = [source["passes"] * source["rows"] for source in data["data.train"]["sources"]]
    assert visits == pytest.approx([0.5 * num_visited, 0.3 * num_visited, 0.2 * num_visited], abs=1)
    assert sum(visits) == pytest.approx(num_visited)
