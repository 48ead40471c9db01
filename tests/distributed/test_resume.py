"""Stopping, dying and going on."""

import pytest

from tests.distributed.conftest import DROPOUT, TERMINATED, TERMINATED_EARLY, ZERO2, Results
from tests.support.lab import MAX_STEPS, Lab


@pytest.mark.parametrize(
    ("stopped", "uninterrupted"),
    [
        ("stopped", "plain"),
        ("stopped-dropout", "dropout"),
        ("stopped-zero2", "zero2"),
        ("stopped-full", "full"),
    ],
)
def test_a_stopped_run_goes_on_exactly(
    lab: Lab, two: Results, two_later: Results, stopped: str, uninterrupted: str
) -> None:
    """75 after a checkpoint of step 3; then the same numbers, bit for bit."""
    assert [result[stopped] for result in two] == [{"code": 75}] * 2
    assert [result[stopped] for result in two_later] == [{"code": 0}] * 2
    assert [entry["step"] for entry in lab.events(stopped, "step")] == list(range(1, MAX_STEPS + 1))
    assert [entry["step"] for entry in lab.events(stopped, "checkpoint")] == [3, MAX_STEPS]
    assert lab.losses(stopped) == lab.losses(uninterrupted)
    assert lab.grad_norms(stopped) == lab.grad_norms(uninterrupted)


@pytest.mark.parametrize("name", TERMINATED)
def test_a_run_that_was_asked_to_stop_goes_on_exactly(lab: Lab, two: Results, two_later: Results, name: str) -> None:
    """The step or evaluation that it was in counts for nothing and is run again, whole."""
    _, changes, last_step = TERMINATED[name]
    uninterrupted = "zero2" if changes == ZERO2 else "dropout" if changes == DROPOUT else "plain"
    assert [result[name] for result in two] == [{"code": 75}] * 2
    assert [result[name] for result in two_later] == [{"code": 0}] * 2
    assert [entry["step"] for entry in lab.events(name, "step")] == list(range(1, MAX_STEPS + 1))
    assert [entry["step"] for entry in lab.events(name, "checkpoint")] == [last_step, MAX_STEPS]
    ends = [(entry["step"], entry["reason"]) for entry in lab.events(name, "run_end")]
    assert ends == [(last_step, "stopped"), (MAX_STEPS, "completed")]
    assert lab.losses(name) == lab.losses(uninterrupted)
    assert lab.grad_norms(name) == lab.grad_norms(uninterrupted)
    assert [entry["step"] for entry in lab.events(name, "eval")] == [0, 2, 4, MAX_STEPS]
    if uninterrupted == "plain":
        evaluations = ([entry["loss"] for entry in lab.events(run, "eval")] for run in (name, "plain"))
        assert next(evaluations) == next(evaluations)


@pytest.mark.parametrize("name", TERMINATED_EARLY)
def test_a_run_that_had_not_begun_leaves_nothing_and_starts_anew(
    lab: Lab, two: Results, two_later: Results, name: str
) -> None:
    """All ranks leave together, though one was asked while another one worked alone."""
    assert [result[name]["message"] for result in two] == ["stopped on request (SIGUSR1)"] * 2
    assert [result[name] for result in two_later] == [{"code": 0}] * 2
    assert not lab.run_dir(f"{name}.1").exists()
    assert [entry["step"] for entry in lab.events(name, "run_start")] == [0]


def test_a_killed_run_goes_on_from_its_last_checkpoint(lab: Lab, two_later: Results) -> None:
    """Killed with signal 9 as step 5 began, with a checkpoint of step 3: step 4 runs twice. Adapter and head."""
    assert [entry["step"] for entry in lab.events("killed", "step")] == [1, 2, 3, 4, 4, 5]
    assert [entry["step"] for entry in lab.events("killed", "run_end")] == [MAX_STEPS]
    assert lab.losses("killed") == lab.losses("bert-on-two")
    assert lab.grad_norms("killed") == lab.grad_norms("bert-on-two")
    assert lab.events("killed", "eval")[-1]["loss"] == lab.events("bert-on-two", "eval")[-1]["loss"]
    first, second = (entry["loss"] for entry in lab.events("killed", "step") if entry["step"] == 4)
    assert first == second


def test_its_damaged_checkpoint_is_set_aside(lab: Lab, two_later: Results) -> None:
    """The run that was killed had a newer one, of step 4; it goes on exactly from that of step 3."""
    first, second = lab.events("killed", "run_start")
    assert "damaged_checkpoints" not in first
    assert (second["step"], second["damaged_checkpoints"]) == (3, ["step-00000004.damaged"])
    assert (lab.run_dir("killed") / "checkpoints" / "step-00000004.damaged").is_dir()


def test_a_run_goes_on_with_more_ranks(lab: Lab, three: Results) -> None:
    assert [entry["world_size"] for entry in lab.events("stopped-on-three", "run_start")] == [2, 3]
    assert [result["stopped-on-three"] for result in three] == [{"code": 0}] * 3
    assert lab.losses("stopped-on-three")[:3] == lab.losses("plain")[:3]
    # the order of float32 sums over ranks is another
    assert lab.losses("stopped-on-three") == pytest.approx(lab.losses("plain"), rel=1e-5)


def test_a_run_goes_on_with_another_stage(lab: Lab, two_later: Results) -> None:
    """As ``deepspeed: auto`` may choose on other GPUs. The checkpoint, of ZeRO-3, has whole tensors."""
    assert [result["stopped-then-zero2"] for result in two_later] == [{"code": 0}] * 2
    assert lab.losses("stopped-then-zero2")[:3] == lab.losses("plain")[:3]
    assert lab.losses("stopped-then-zero2") == pytest.approx(lab.losses("plain"), rel=1e-5)


def test_another_base_is_refused_and_named(lab: Lab, two: Results, two_later: Results) -> None:
    """Same path, same shapes, one weight changed since the checkpoint."""
    assert [result["other_base"] for result in two] == [{"code": 75}] * 2
    for result in two_later:
        message = result["other_base"]["message"]
        assert "'model.layers.1.mlp.down_proj.weight' is " in message and "was trained on another base" in message
    assert len(lab.events("other_base", "run_start")) == 1


def test_other_settings_are_refused_and_listed(lab: Lab, two_later: Results) -> None:
    for result in two_later:
        message = result["refused"]["message"]
        assert "optimizer.lr: 1.0 now, 0.01 in the checkpoint" in message
        assert "adapter.projections: ['q', 'v', 'o'] now, ['q', 'v'] in the checkpoint" in message
    assert len(lab.events("refused", "run_start")) == 1  # that of the run it is a copy of
