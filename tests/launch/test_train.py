"""launch/train.py as it is typed: under deepspeed, torchrun and plain python."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from qvtune.config.load import load_config
from qvtune.data.statistics import Statistics
from tests.launch.conftest import TRAIN, train, train_forked, without_gpu
from tests.support.browser import look_at, require_chromium
from tests.support.lab import Lab

NUM_RANKS = {"deepspeed": 2, "torchrun": 2, "python": 1}
REPORTS = ("report.html=true", "report.trackers=[tensorboard]")
PEAKS = {"peak_rss_bytes", "peak_device_bytes"}
STAGES = {"deepspeed": "auto", "torchrun": "zero3.json", "python": "zero3.json"}
FIELDS = {
    "run_start": {"step", "max_steps", "world_size", "resumed_from", "trained_parameters"},
    "base_loaded": {"seconds", "bytes_read", "base_bytes", "peak_rss_bytes"},
    "step": {
        "step",
        "loss",
        "tokens",
        "label_tokens",
        "seconds",
        "grad_norm",
        "lr",
        "peak_rss_bytes",
        "peak_device_bytes",
    },
    "eval": {"step", "loss", "token_accuracy", "perplexity", "seconds"},
    "checkpoint": {"step", "bytes", "blocked_seconds", "update_norms"},
    "run_end": {"step", "reason", "seconds", *PEAKS},
}


@pytest.fixture(scope="session")
def python(lab: Lab) -> str:
    """Name of a complete run as one process, which has found an earlier run in its place."""
    (lab.run_dir("python") / "checkpoints").mkdir(parents=True)
    (lab.run_dir("python") / "metrics.jsonl").write_text("of the earlier run")
    return _complete(lab, "python")


@pytest.fixture(scope="session")
def deepspeed(lab: Lab) -> str:
    return _complete(lab, "deepspeed")


@pytest.fixture(scope="session")
def torchrun(lab: Lab) -> str:
    return _complete(lab, "torchrun")


@pytest.fixture(params=["python", "torchrun", pytest.param("deepspeed", marks=without_gpu)])
def run(request: pytest.FixtureRequest) -> str:
    """Name of a run that has been completed, and of its launcher."""
    name: str = request.getfixturevalue(request.param)
    return name


def _complete(lab: Lab, launcher: str) -> str:
    ended = train(lab, launcher, launcher, "checkpoint.resume=never", *REPORTS, f"deepspeed={STAGES[launcher]}")
    assert ended.code == 0, ended.output
    assert ("deepspeed: auto: zero3.json, as always on CPUs" in ended.output) == (STAGES[launcher] == "auto")
    return launcher


def test_the_record_is_complete(lab: Lab, run: str) -> None:
    """Every event of DESIGN.md with its fields, and no other."""
    lines = [json.loads(line) for line in (lab.run_dir(run) / "metrics.jsonl").read_text().splitlines()]
    events = [(line["event"], line.get("step")) for line in lines]
    # The first checkpoint is written while step 2 is computed; the second waits for it.
    assert events.index(("step", 1)) < events.index(("checkpoint", 1)) < events.index(("checkpoint", 2))
    events.remove(("checkpoint", 1))
    assert events == [
        ("run_start", 0),
        ("base_loaded", None),
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("checkpoint", 2),
        ("run_end", 2),
    ]
    for line in lines:
        assert line.keys() == FIELDS[line["event"]] | {"event", "time"}
    assert lines[0]["world_size"] == NUM_RANKS[run]
    assert lines[3]["lr"].keys() == {"q", "v"}


def test_all_launchers_train_alike(lab: Lab, run: str, python: str) -> None:
    """1e-5: float32 sums in another order, on another number of ranks."""
    losses, expected = ([entry["loss"] for entry in lab.events(name, "step")] for name in (run, python))
    assert losses == pytest.approx(expected, rel=1e-5)


@without_gpu
def test_auto_trains_what_zero3_trains(lab: Lab, deepspeed: str, torchrun: str) -> None:
    """Both on 2 ranks: bit for bit."""
    auto, named = (
        [(entry["loss"], entry["grad_norm"]) for entry in lab.events(name, "step")] for name in (deepspeed, torchrun)
    )
    assert auto == named
    used = [(lab.run_dir(name) / "deepspeed.json").read_text() for name in (deepspeed, torchrun)]
    assert used[0] == used[1]


def test_the_configuration_can_be_loaded_again(lab: Lab, run: str) -> None:
    config = load_config(lab.run_dir(run) / "config.yaml")
    recipe = load_config(lab.folder / "recipe.yaml")
    assert config.checkpoint.resume == "never" and config.deepspeed == STAGES[run]
    own = {"run_dir": str(lab.run_dir(run)), "checkpoint": config.checkpoint, "report": config.report}
    own["deepspeed"] = config.deepspeed
    assert config == recipe.model_copy(update=own)


def test_the_environment_is_recorded(lab: Lab, run: str) -> None:
    environment = json.loads((lab.run_dir(run) / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["world_size"] == NUM_RANKS[run] == len(environment["hosts"])
    assert environment["argv"][0] == str(TRAIN) and "checkpoint.resume=never" in environment["argv"]
    resolved = json.loads((lab.run_dir(run) / "deepspeed.json").read_text())
    assert resolved["gradient_accumulation_steps"] == 6 // NUM_RANKS[run]


def test_the_data_is_recorded(lab: Lab, run: str) -> None:
    data = json.loads((lab.run_dir(run) / "data.json").read_text())
    fields = {field.name for field in dataclasses.fields(Statistics)}
    assert {name: set(numbers) for name, numbers in data.items()} == {
        "data.train": {"source", "passes", "samples", *fields},
        "data.eval": {"source", *fields},
    }
    train = data["data.train"]
    assert train["source"] == str(lab.folder / "train.jsonl") and train["documents"] == 60
    assert train["passes"] > 0
    first_step = lab.events(run, "step")[0]
    assert 0 < first_step["tokens"] < train["tokens"] and first_step["label_tokens"] < train["label_tokens"]


def test_tensorboard_shows_the_losses(lab: Lab, run: str) -> None:
    board = EventAccumulator(str(lab.run_dir(run) / "tensorboard"))
    board.Reload()
    shown = {scalar.step: scalar.value for scalar in board.Scalars("step/loss")}
    assert shown == {entry["step"]: pytest.approx(entry["loss"], rel=1e-6) for entry in lab.events(run, "step")}
    assert [scalar.step for scalar in board.Scalars("eval/loss")] == [0, 2]


def test_the_report_is_finished(lab: Lab, run: str) -> None:
    html = (lab.run_dir(run) / "report.html").read_text(encoding="utf-8")
    assert "completed: step 2 of 2" in html
    for part in (
        "Loss",
        "Learning rates and norms",
        "by layer, at the checkpoint of step 2",
        "<mark>",
        "Starts and faults",
    ):
        assert part in html, part


def test_the_report_is_shown_in_a_browser(lab: Lab, python: str) -> None:
    require_chromium()
    seen = look_at(lab.run_dir(python) / "report.html")
    assert seen.requests == [] and seen.problems == [] and seen.clipped == [] and seen.overflow == 0
    assert seen.drawn >= 8


def test_peft_loads_the_checkpoint_as_it_is(lab: Lab, run: str) -> None:
    checkpoint = lab.run_dir(run) / "checkpoints" / "latest"
    assert checkpoint.resolve().name == "step-00000002"
    base = AutoModelForCausalLM.from_pretrained(lab.folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, checkpoint)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert (adapted - model(input_ids=ids).logits).abs().max() > 1e-3
    stored = load_file(checkpoint / "adapter_model.safetensors")
    for name, tensor in stored.items():
        loaded = model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(loaded, tensor), name


def test_an_earlier_run_is_moved_aside(lab: Lab, python: str) -> None:
    aside = lab.run_dir("python.1")
    assert (aside / "metrics.jsonl").read_text() == "of the earlier run"
    assert (aside / "checkpoints").is_dir()


def test_a_changed_setting_is_refused_at_resume(lab: Lab, python: str) -> None:
    before = (lab.run_dir("python") / "metrics.jsonl").read_bytes()
    ended = train_forked(lab, "python", "optimizer.lr=1.0", "data.max_length=32")
    assert ended.code == 2, ended.output
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert lines[0] == "error: data.max_length: 32 now, 64 in the checkpoint"
    assert lines[1] == "error: optimizer.lr: 1.0 now, 0.01 in the checkpoint"
    assert "checkpoint.resume=never" in lines[2]
    assert "Traceback" not in ended.stderr
    assert (lab.run_dir("python") / "metrics.jsonl").read_bytes() == before
