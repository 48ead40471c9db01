"""Whether a run starts anew or goes on, and what is kept of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.folder import step_folder
from qvtune.checkpoint.state import TrainerState
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.storage.files import write_json
from qvtune.train.run_folder import environment, find_resume, open_run_folder, require_same_rows, trajectory_settings
from tests.support.lab import flip_a_bit
from tests.support.processes import files_of_at_most

pytestmark = pytest.mark.usefixtures("one_process")


def config(run_dir: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"run_dir": str(run_dir), "train": {"max_steps": 4}, **sections})


def write_checkpoint(made_with: RunConfig, step: int, trajectory: dict[str, Any] | None = None) -> Path:
    trainer = TrainerState(step=step, trajectory=trajectory or trajectory_settings(made_with))
    checkpoints = Path(made_with.run_dir) / "checkpoints"
    checkpoint_folder.write(checkpoints, step, lambda folder: write_json(folder / "trainer_state.json", vars(trainer)))
    return step_folder(checkpoints, step)


RESUME_MODES = ["never", "if_available", "always"]


@pytest.mark.parametrize(("mode", "goes_on"), [("never", False), ("if_available", True), ("always", True)])
def test_with_checkpoints_the_newest_is_resumed_unless_never(tmp_path: Path, mode: str, goes_on: bool) -> None:
    run = config(tmp_path / "run", checkpoint={"resume": mode})
    write_checkpoint(run, 1)
    newest = write_checkpoint(run, 2)
    assert find_resume(run) == (newest if goes_on else None)


@pytest.mark.parametrize("mode", ["never", "if_available"])
@pytest.mark.parametrize("run_dir_exists", [False, True])
def test_without_checkpoints_a_run_starts_anew(tmp_path: Path, mode: str, run_dir_exists: bool) -> None:
    if run_dir_exists:
        (tmp_path / "run").mkdir()
    assert find_resume(config(tmp_path / "run", checkpoint={"resume": mode})) is None


def test_always_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.resume: always, but .*run/checkpoints holds no checkpoint"):
        find_resume(config(tmp_path / "run", checkpoint={"resume": "always"}))


@pytest.mark.parametrize("mode", RESUME_MODES)
def test_a_run_dir_that_is_a_file(tmp_path: Path, mode: str) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run_dir: .* is a file; give a folder"):
        find_resume(config(tmp_path / "run", checkpoint={"resume": mode}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda folder: flip_a_bit(folder / "trainer_state.json"), "the content is not what was written"),
    "cut off": (lambda folder: (folder / "trainer_state.json").write_text("{}"), "2 bytes"),
    "a file": (lambda folder: (folder / "trainer_state.json").unlink(), "missing"),
    "the manifest": (lambda folder: (folder / "manifest.json").unlink(), "cannot be read"),
    "half of the manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    damage, message = DAMAGE[what]
    run = config(tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    whole = write_checkpoint(run, 1)
    for step in (2, 3):
        damage(write_checkpoint(run, step))
    checkpoint_folder.mark_best(checkpoints, {1: 2.0, 3: 1.0})
    names = {path.name for path in checkpoints.iterdir()}
    assert find_resume(run) == whole
    assert {path.name for path in checkpoints.iterdir()} == names, "changed by a look"

    resume, _, damaged = open_run_folder(run, {}, {})
    assert (resume, damaged) == (whole, ["step-00000002.damaged", "step-00000003.damaged"])
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000001", "latest", *damaged}
    assert (checkpoints / "latest").resolve() == whole
    said = "".join("".join(capsys.readouterr()).split())
    for part in (message, "step-00000003.damaged,andtherungoesonfromstep-00000001"):
        assert part.replace(" ", "") in said

    damage(write_checkpoint(run, 2))  # once more at the same step
    assert open_run_folder(run, {}, {})[2] == ["step-00000002.damaged.2"]


def test_without_a_whole_checkpoint_nothing_is_begun(tmp_path: Path) -> None:
    run = config(tmp_path / "run")
    for step in (1, 2):
        (write_checkpoint(run, step) / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        find_resume(run)
    newer, older, advice = caught.value.problems
    assert "step-00000002" in newer and "step-00000001" in older
    assert advice.startswith("all checkpoints are damaged: start from scratch with checkpoint.resume=never")


def test_always_does_not_go_back_by_itself(tmp_path: Path) -> None:
    run = config(tmp_path / "run", checkpoint={"resume": "always"})
    write_checkpoint(run, 1)
    (write_checkpoint(run, 2) / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"2 bytes.*\n.*go on from the one before with checkpoint\.resume=if_available"):
        find_resume(run)


def test_every_setting_that_leads_elsewhere_is_listed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    made = config(run_dir, optimizer={"lr": 1e-3, "lr_multipliers": {"v": 4}}, adapter={"rank": 8})
    write_checkpoint(made, 2)
    now = config(run_dir, optimizer={"lr": 2e-3, "lr_multipliers": {"v": 2, "q": 1}}, train={"max_steps": 4, "seed": 7})
    with pytest.raises(UserError) as caught:
        find_resume(now)
    *differences, advice = caught.value.problems
    assert differences == [
        "adapter.rank: 16 now, 8 in the checkpoint",
        "optimizer.lr: 0.002 now, 0.001 in the checkpoint",
        "optimizer.lr_multipliers: [['v', 2.0], ['q', 1.0]] now, [['v', 4.0]] in the checkpoint",
        "train.seed: 7 now, 0 in the checkpoint",
    ]
    assert "set them back, choose another run_dir" in advice


def test_the_order_of_the_patterns_counts(tmp_path: Path) -> None:
    multipliers = {"v": 2.0, "layers": 3.0}
    first = config(tmp_path / "run", optimizer={"lr_multipliers": multipliers})
    write_checkpoint(first, 2)
    assert find_resume(first) == step_folder(tmp_path / "run/checkpoints", 2)
    swapped = config(tmp_path / "run", optimizer={"lr_multipliers": dict(reversed(multipliers.items()))})
    with pytest.raises(UserError, match="lr_multipliers"):
        find_resume(swapped)


def test_what_does_not_decide_the_losses_may_change(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_checkpoint(config(run_dir), 2)
    changed = config(
        run_dir,
        deepspeed="zero2.json",
        checkpoint={"keep": 7},
        model={"attention": "eager"},
        data={"eval": "demo"},
        train={
            "epochs": 2,
            "micro_batch_size": 2,
            "eval_every": 5,
            "save_every": 5,
            "activation_checkpointing": True,
            "generate": {"prompts": ["hello"]},
            "best_metric": "token_accuracy",
            "max_hours": 0.5,
        },
    )
    assert find_resume(changed) == step_folder(run_dir / "checkpoints", 2)


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    """A run that was begun by a version without the setting goes on, unless it is now something else."""
    old = config(tmp_path / "run")
    trajectory = trajectory_settings(old)
    del trajectory["data"]["on_long_row"], trajectory["optimizer"]["eps"]
    checkpoint = write_checkpoint(old, 2, trajectory)
    assert find_resume(old) == checkpoint
    with pytest.raises(UserError) as caught:
        find_resume(config(tmp_path / "run", data={"on_long_row": "split"}, optimizer={"eps": 1e-6}))
    assert list(caught.value.problems[:-1]) == [
        "data.on_long_row: 'split' now, 'cut' in the checkpoint",
        "optimizer.eps: 1e-06 now, 1e-08 in the checkpoint",
    ]


def test_other_weights_of_the_sources_are_refused(tmp_path: Path) -> None:
    def mixture(*weights: float, **settings: Any) -> RunConfig:
        sources = [{"path": f"{index}.jsonl", "weight": weight} for index, weight in enumerate(weights)]
        return config(tmp_path / "run", data={"train": sources, **settings})

    checkpoint = write_checkpoint(mixture(0.5, 0.5), 2)
    assert find_resume(mixture(0.5, 0.5, num_workers=7)) == checkpoint
    with pytest.raises(UserError) as caught:
        find_resume(mixture(0.6, 0.5))
    assert caught.value.problems[0] == "data.train.0.weight: 0.6 now, 0.5 in the checkpoint"


def test_every_other_setting_decides() -> None:
    """A new setting belongs to the trajectory until somebody says that it does not."""
    settings = trajectory_settings(config(Path("run")))
    assert settings["train"].keys() == {"global_batch_size", "seed"}
    model = {"name_or_path", "revision", "quantization", "double_quant", "dtype", "allow_pickle", "trust_remote_code"}
    assert settings["model"].keys() == model
    optimizer = {"lr", "lr_multipliers", "betas", "eps", "weight_decay", "max_grad_norm"}
    assert settings["optimizer"].keys() == optimizer | {"head_weight_decay", "as_in_paper"}
    assert settings.keys() == {"task", "model", "adapter", "optimizer", "schedule", "data", "train"}
    assert json.loads(json.dumps(settings)) == settings, "as it comes back from trainer_state.json"


def test_a_checkpoint_of_a_version_with_fewer_settings_has_their_defaults(tmp_path: Path) -> None:
    folder = write_checkpoint(config(tmp_path / "run"), 2)
    stored = json.loads((folder / "trainer_state.json").read_text())
    del stored["trajectory"]["optimizer"]["as_in_paper"], stored["trajectory"]["schedule"]["min_ratio"]
    (folder / "trainer_state.json").write_text(json.dumps(stored))
    (folder / "manifest.json").write_text("{}")
    assert find_resume(config(tmp_path / "run")) == folder
    with pytest.raises(UserError, match=r"schedule\.min_ratio: 0\.5 now, 0\.0 in the checkpoint"):
        find_resume(config(tmp_path / "run", schedule={"min_ratio": 0.5}))


def test_the_record_of_a_new_run(tmp_path: Path) -> None:
    run = config(tmp_path / "runs/new")
    resume, owner, _ = open_run_folder(run, {"zero_optimization": {"stage": 3}}, {"data.train": {"rows": 3}})
    assert resume is None and owner is not None and owner.run_dir == tmp_path / "runs/new"
    written = {path.name for path in (tmp_path / "runs/new").iterdir() if not path.name.startswith(".owner-")}
    assert written == {"config.yaml", "deepspeed.json", "data.json", "environment.json", "checkpoints"}
    assert RunConfig.model_validate(yaml.safe_load((tmp_path / "runs/new/config.yaml").read_text())) == run
    assert json.loads((tmp_path / "runs/new/deepspeed.json").read_text()) == {"zero_optimization": {"stage": 3}}
    assert json.loads((tmp_path / "runs/new/data.json").read_text()) == {"data.train": {"rows": 3}}


def test_an_earlier_run_is_moved_aside_and_kept(tmp_path: Path) -> None:
    run = config(tmp_path / "run", checkpoint={"resume": "never"})
    for content in ("first", "second", "third"):
        open_run_folder(run, {}, {})
        (tmp_path / "run/mark").write_text(content)
    assert {path.name: (path / "mark").read_text() for path in tmp_path.iterdir()} == {
        "run.1": "first",
        "run.2": "second",
        "run": "third",
    }


def test_what_belongs_to_the_job_that_starts_is_not_an_earlier_run(tmp_path: Path) -> None:
    for name in ("logs", "submitted"):
        (tmp_path / "run" / name).mkdir(parents=True)
    run = config(tmp_path / "run")
    open_run_folder(run, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    open_run_folder(run, {}, {})  # without a checkpoint this begins anew
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1"}
    assert {"logs", "submitted"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run.1/logs").exists()


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    open_run_folder(config(tmp_path / "run"), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_resumed_run_stays_and_loses_only_what_was_unfinished(tmp_path: Path) -> None:
    run = config(tmp_path / "run")
    resume = write_checkpoint(run, 2)
    (tmp_path / "run/checkpoints/.step-00000003-abc").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    assert open_run_folder(run, {}, {})[0] == resume
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"step-00000002", "latest"}
    assert (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("num_bytes", [0, 600])
def test_a_disk_without_room_is_one_message(tmp_path: Path, num_bytes: int) -> None:
    """It refuses the first file, or a later one."""
    refused = pytest.raises(UserError, match=r"run_dir: .*run cannot be written \(.*File too large\); make room")
    with files_of_at_most(num_bytes), refused:
        open_run_folder(config(tmp_path / "run"), {}, {})


TRAINED = {"data.train": {"source": "a.jsonl", "rows": 3, "crc32": "0a", "longest": [{"row": 1}], "label_share": 0.5}}


def test_the_same_rows_give_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path / "run")
    write_checkpoint(run, 2)
    open_run_folder(run, {}, TRAINED)
    before = (tmp_path / "run/data.json").read_bytes()
    require_same_rows(tmp_path / "run", TRAINED)
    open_run_folder(run, {}, TRAINED)
    assert (tmp_path / "run/data.json").read_bytes() == before
    assert capsys.readouterr().out == ""


def test_other_training_rows_are_refused_with_what_is_different(tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", TRAINED)
    now = {"data.train": {**TRAINED["data.train"], "rows": 4, "crc32": "0b", "longest": [], "label_share": 0.4}}
    with pytest.raises(UserError) as caught:
        require_same_rows(tmp_path, now)
    (problem,) = caught.value.problems
    assert problem.startswith("data.train: not the rows that the run in ")
    assert "(rows 4, was 3; crc32 0b, was 0a)" in problem and "checkpoint.resume=never" in problem


def test_other_weights_and_rows_of_a_source_are_refused(tmp_path: Path) -> None:
    sources = [{"source": name, "weight": 1.0, "crc32": "0a", "passes": 2.0} for name in ("a", "b")]
    before = {"data.train": {"source": ["a", "b"], "rows": 3, "sources": sources}}
    write_json(tmp_path / "data.json", before)
    require_same_rows(tmp_path, before)
    now = [{**sources[0], "passes": 3.0}, {**sources[1], "weight": 2.0, "crc32": "0b"}]
    with pytest.raises(UserError, match=r"\(weight of b 2\.0, was 1\.0; crc32 of b 0b, was 0a\)"):
        require_same_rows(tmp_path, {"data.train": {**before["data.train"], "sources": now}})


def test_what_an_earlier_start_has_not_recorded_is_not_compared(tmp_path: Path) -> None:
    """A run of a version that wrote no file, or fewer fields."""
    require_same_rows(tmp_path, TRAINED)
    write_json(tmp_path / "data.json", {"data.train": {"rows": 3, "no_longer_written": 1}})
    require_same_rows(tmp_path, TRAINED)


def test_other_evaluation_rows_are_said_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path / "run")
    write_checkpoint(run, 2)
    for rows in (5, 6):
        open_run_folder(run, {}, {**TRAINED, "data.eval": {"rows": rows}, "data.eval.same": {"rows": 7}})
    assert capsys.readouterr().out == "data.eval: other rows than at the run's last start (rows 6, was 5)\n"
    assert json.loads((tmp_path / "run/data.json").read_text())["data.eval"] == {"rows": 6}


def test_ranks_other_than_0_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    open_run_folder(config(tmp_path / "run"), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CONF", "not of interest")
    found = environment(["node-a", "node-b"])
    assert found["hosts"] == ["node-a", "node-b"]
    assert found["argv"] == sys.argv
    assert found["slurm"] == {"SLURM_JOB_ID": "17"}
    assert found["packages"]["torch"] and found["packages"]["qvtune"]
    assert found["packages"].keys() >= {"deepspeed", "flash-attn"}, "what is not installed is there as null"
    json.dumps(found)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"stage": 3}, {"stage": 3, "overlap_comm": False}, ""),
        ({"stage": 3}, {"stage": 2}, "deepspeed: ZeRO-2 now, ZeRO-3 at the run's last start"),
        (
            {"stage": 3, "zero_hpz_partition_size": 8},
            {"stage": 3, "zero_hpz_partition_size": 4},
            "deepspeed: ZeRO-3 with hpZ over 4 ranks now, ZeRO-3 with hpZ over 8 ranks at the run's last start",
        ),
    ],
)
def test_another_stage_is_said_when_a_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    run = config(tmp_path / "run")
    open_run_folder(run, {"zero_optimization": before}, {})
    write_checkpoint(run, 1)
    assert "deepspeed" not in capsys.readouterr().out
    open_run_folder(run, {"zero_optimization": now}, {})
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown if said else "deepspeed" not in shown
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text()) == {"zero_optimization": now}
