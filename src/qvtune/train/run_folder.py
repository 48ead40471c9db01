"""The run folder: whether a run starts there from scratch or resumes, and the record of what was run."""

import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qvtune import versions
from qvtune.checkpoint import folder as checkpoint_folder
from qvtune.checkpoint.owner import Owner, take
from qvtune.checkpoint.state import load_trainer_state
from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig, TrainSection
from qvtune.console import console
from qvtune.distributed import process_group
from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_file
from qvtune.storage.files import write_json
from qvtune.train.data import TRAIN

# Settings that may change between the starts of a run. They do not change the losses, or, like another number of steps
# through the schedule, change them as asked for and logged. All others must stay the same.
_FREE_SETTINGS = {
    "": {"run_dir", "deepspeed", "checkpoint", "report"},
    "train": {
        "max_steps",
        "epochs",
        "micro_batch_size",
        "eval_every",
        "eval_at_start",
        "eval_rows",
        "save_every",
        "early_stopping",
        "best_metric",
        "generate",
        "stop_after_step",
        "max_hours",
        "hang_seconds",
        "activation_checkpointing",
    },
    "model": {"attention", "deterministic_attention"},
    "data": {"eval", "num_workers"},
    "classification": {"metric"},
}
_DATA, _DEEPSPEED = "data.json", "deepspeed.json"
_NONE_WHOLE = "start from scratch with checkpoint.resume=never (the old run is moved aside), or in another run_dir"
_OF_THE_JOB = ("logs", "submitted")  # made before the run starts; they may hold the code that is running


def trajectory_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine a run's losses, as plain JSON values."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude=_FREE_SETTINGS[""])
    # The first matching pattern applies, so their order counts, which a comparison of mappings would not notice.
    settings["optimizer"]["lr_multipliers"] = [list(item) for item in config.optimizer.lr_multipliers.items()]
    return {
        section: {key: value for key, value in values.items() if key not in _FREE_SETTINGS.get(section, ())}
        if isinstance(values, dict)
        else values
        for section, values in settings.items()
    }


def find_resume(config: RunConfig, verified: Path | None = None) -> Path | None:
    """The checkpoint that this run resumes from, verified; None for a new run.

    ``verified`` names one that has been verified before by this start: comparing its files once is enough.
    With ``checkpoint.resume: if_available`` it is the newest that is not damaged. Raises UserError when all are damaged
    (with ``always``: when the newest is), when ``always`` finds none, and when the checkpoint was made with settings
    that give other losses.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; give a folder")
    if config.checkpoint.resume == "never":
        return None
    checkpoints, must_exist = run_dir / "checkpoints", config.checkpoint.resume == "always"
    found, problems = checkpoint_folder.newest_whole(checkpoints, verified)
    if problems and (found is None or must_exist):
        which = "the newest checkpoint is" if found else "all checkpoints are"
        advice = "delete it, or go on from the one before with checkpoint.resume=if_available" if found else _NONE_WHOLE
        raise UserError([*problems, f"{which} damaged: {advice}"])
    if found is None:
        if must_exist:
            raise UserError(f"checkpoint.resume: always, but {checkpoints} holds no checkpoint")
        return None
    now = trajectory_settings(config)
    differences = _differences(_completed(load_trainer_state(found).trajectory, now, config), now)
    if differences:
        raise UserError(
            [
                *differences,
                f"{found} was made with other settings: set them back, choose another run_dir, or start from "
                "scratch with checkpoint.resume=never (the old run is moved aside)",
            ]
        )
    return found


def _completed(stored: dict[str, Any], now: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """``stored`` with the defaults of settings that the version that wrote it did not have yet."""
    defaults = trajectory_settings(RunConfig(run_dir="", task=config.task, train=TrainSection(max_steps=1)))
    completed = dict(stored)
    for section, values in now.items():
        if isinstance(values, dict):
            known = stored.get(section, {})
            new = {key: defaults[section][key] for key in values if key not in known and key in defaults[section]}
            completed[section] = known | new
    return completed


def _differences(stored: dict[Any, Any], now: dict[Any, Any], where: str = "") -> list[str]:
    problems = []
    for key in sorted(stored.keys() | now.keys()):
        before: Any = stored.get(key)
        after: Any = now.get(key)
        if _are_mappings(before) and _are_mappings(after) and len(before) == len(after):  # sources
            before, after = dict(enumerate(before)), dict(enumerate(after))
        if isinstance(before, dict) and isinstance(after, dict):
            problems += _differences(before, after, f"{where}{key}.")
        elif before != after:
            problems.append(f"{where}{key}: {after!r} now, {before!r} in the checkpoint")
    return problems


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def require_same_rows(run_dir: Path, data: dict[str, Any]) -> None:
    """Compare ``data`` (see ``data_statistics``) with what an earlier start of the run has written into data.json.

    Raises UserError where the training rows are others: a resumed run continues in the order of the first start's rows.
    """
    if changes := _changes(run_dir, data, TRAIN):
        raise UserError(
            f"{TRAIN}: not the rows that the run in {run_dir} was started with, says {_DATA} there ({changes}): set it "
            "back, choose another run_dir, or start from scratch with checkpoint.resume=never (the old run is moved "
            "aside)"
        )


def _changes(run_dir: Path, data: dict[str, Any], setting: str) -> str:
    """In which numbers a data set differs from the one in data.json; empty where it does not, or is not in there."""
    path = run_dir / _DATA
    stored = _comparable(json.loads(path.read_text(encoding="utf-8")).get(setting, {}) if path.exists() else {})
    now = _comparable(data.get(setting, {}))
    changed = [name for name in stored if name in now and stored[name] != now[name]]
    return "; ".join(f"{name} {now[name]}, was {stored[name]}" for name in changed)


def _comparable(statistics: dict[str, Any]) -> dict[str, Any]:
    """What must stay as it is: numbers of rows, checksums, and the weights of sources."""
    found = {name: value for name, value in statistics.items() if isinstance(value, int | str)}
    for one in statistics.get("sources", ()):
        found |= {f"{name} of {one['source']}": one[name] for name in ("weight", "crc32") if name in one}
    return found


def open_run_folder(
    config: RunConfig, deepspeed_config: dict[str, Any], data: dict[str, Any], verified: Path | None = None
) -> tuple[Path | None, Owner | None, list[str]]:
    """Take the folder; write config.yaml, deepspeed.json, data.json and environment.json. Collective, rank 0 writes.

    Returns the checkpoint to resume from, as ``find_resume`` does, now that no other run can add or delete one; on
    rank 0 the owner; and on rank 0 the names of newer, damaged checkpoints as they are now. ``verified``: see there.
    Where a new run starts, files of an earlier one are moved to ``run_dir.1``, ``.2``, ... The job's own ``logs`` and
    ``submitted`` stay. Raises UserError where the folder cannot be written.
    """
    hosts = process_group.all_gather_object(socket.gethostname())
    owner, damaged = None, []
    with process_group.raise_on_all_ranks(), refused_by_the_disk(config):
        if process_group.is_main():
            owner = take(Path(config.run_dir))
    resume = process_group.on_main(lambda: find_resume(config, verified))
    with process_group.raise_on_all_ranks(), refused_by_the_disk(config):
        if owner is not None:
            damaged = _set_damaged_aside(owner, resume) if resume is not None else []
            if resume is None and (aside := owner.set_aside(keep=_OF_THE_JOB)):
                console().print(f"an earlier run was in {owner.run_dir}; it is now {aside}")
            if resume is not None and (line := _changed_stage(owner.run_dir, deepspeed_config)):
                console().print(line)
            for setting in data:
                if setting != TRAIN and (changes := _changes(owner.run_dir, data, setting)):
                    console().print(f"{setting}: other rows than at the run's last start ({changes})", markup=False)
            _write_records(
                owner,
                dump_config(config),
                {_DEEPSPEED: deepspeed_config, _DATA: data, "environment.json": environment(hosts)},
            )
    return resume, owner, damaged


def _changed_stage(run_dir: Path, deepspeed_config: dict[str, Any]) -> str | None:
    """For the log: that a run resumes with another ZeRO stage than that of its last start."""
    path = run_dir / _DEEPSPEED
    before, now = (
        _stage(one)
        for one in (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else deepspeed_config,
            deepspeed_config,
        )
    )
    if before == now:
        return None
    return f"deepspeed: {now} now, {before} at the run's last start: losses are the same but for rounding"


def _stage(deepspeed_config: dict[str, Any]) -> str:
    zero = deepspeed_config.get("zero_optimization", {})
    node = zero.get("zero_hpz_partition_size", 1)
    return f"ZeRO-{zero.get('stage')}" + (f" with hpZ over {node} ranks" if node > 1 else "")


@contextmanager
def refused_by_the_disk(config: RunConfig) -> Iterator[None]:
    """Raises UserError, which names run_dir, for an OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run_dir: {config.run_dir} cannot be written ({error}); make room, or give another") from error


def _write_records(owner: Owner, config: str, records: dict[str, Any]) -> None:
    with owner.writing() as workspace:
        with atomic_file(owner.run_dir / "config.yaml", workspace=workspace) as private:
            private.write_text(config, encoding="utf-8")
        for name, content in records.items():
            with atomic_file(owner.run_dir / name, workspace=workspace) as private:
                write_json(private, content)
        checkpoints = owner.run_dir / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        checkpoint_folder.remove_unfinished(checkpoints)


def _set_damaged_aside(owner: Owner, resume: Path) -> list[str]:
    _, problems = checkpoint_folder.newest_whole(resume.parent, resume)
    with owner.writing() as workspace:
        aside = checkpoint_folder.set_damaged_aside(resume.parent, resume, workspace)
    for path in aside:
        lost = f"damaged checkpoint: it is now {path}, and the run goes on from {resume.name}, the newest whole one"
        console().print("\n".join([*problems, lost]), markup=False, style="bold red")
    return [path.name for path in aside]


def environment(hosts: list[str]) -> dict[str, Any]:
    """Versions, commit, command line and machines of this start."""
    return {
        "packages": versions.installed(),
        "python": platform.python_version(),
        "commit": versions.commit(),
        "argv": sys.argv,
        "hosts": hosts,
        "world_size": process_group.world_size(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "torch_num_threads": torch.get_num_threads(),
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB")},
    }
