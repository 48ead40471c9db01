"""A worker trains cell after cell in one process, with the bits of runs that were started alone; some cells fail."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvtune.study.cell import Cell, dump_cells, read_cells
from qvtune.study.worker import FAILED
from tests.support.forks import fork_command, fork_ranks
from tests.support.lab import Lab, make_lab
from tests.support.processes import Finished

# Different settings one after another, in one process.
CELLS = {
    "qv": [],
    "no-match": ["optimizer.lr_multipliers.gate=2"],
    "full": ["adapter={method: full, projections: [q, v]}"],
    "qkv-zero2": ["adapter.projections=[q, k, v]", "deepspeed=zero2.json"],
    "full-zero2": ["adapter={method: full, projections: [q, v]}", "deepspeed=zero2.json"],
    "qv-again": [],
    "dropout-zero2": ["deepspeed=zero2.json", "train.seed=3", "adapter.dropout=0.1"],
}
TRAINED = [name for name in CELLS if name != "no-match"]
ALONE = ("qv-again", "dropout-zero2")  # after all that could be left of others
STEPS = 2
# The worker of a study, in which cells whose name says so end with an error.
SCRIPT = """
import gc, os, sys
from deepspeed import DeepSpeedEngine
from qvtune.study.worker import main
from qvtune.train import loop

train = loop.train

def failing(config, *arguments):
    with open(os.path.join({study!r}, "engines.txt"), "a") as file:
        file.write(f"{{sum(isinstance(one, DeepSpeedEngine) for one in gc.get_objects())}} ")
    if "broken" in config.run_dir:
        raise RuntimeError("step 2: the loss is nan")
    return train(config, *arguments)

loop.train = failing
sys.exit(main([{study!r}, str(os.getppid()), str(os.open({pipe!r}, os.O_WRONLY))]))
"""


def make_study(lab: Lab, name: str, cells: dict[str, list[str]]) -> Path:
    """A study that no worker has seen."""
    study = lab.folder / name
    study.mkdir()
    changes: dict[str, Any] = {
        "data__eval": str(lab.folder / "eval.jsonl"),
        "train__eval_rows": True,
        "train__max_steps": STEPS,
    }
    (study / "recipe.yaml").write_text(yaml.safe_dump(lab.config("unused", **changes), sort_keys=False))
    (study / "grid.yaml").write_text(dump_cells([Cell(one, tuple(given), {}) for one, given in cells.items()]))
    return study


def work(lab: Lab, study: Path, num_ranks: int = 1) -> tuple[list[Finished], list[dict[str, Any]]]:
    """How the ranks of one worker ended, and what it reported."""
    read_end, write_end = os.pipe()
    script = SCRIPT.format(study=str(study), pipe=f"/proc/{os.getpid()}/fd/{write_end}")
    ended = fork_ranks(["-c", script], num_ranks, study / "worker", timeout=300, **lab.environment)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        return ended, [json.loads(line) for line in pipe]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def study(lab: Lab, request: pytest.FixtureRequest) -> tuple[Path, int, list[dict[str, Any]]]:
    study = make_study(lab, f"study-{request.param}", CELLS)
    ended, events = work(lab, study, request.param)
    assert {end.code for end in ended} == {0}, ended[0].output
    return study, request.param, events


def test_it_says_what_becomes_of_each_cell(study: tuple[Path, int, list[dict[str, Any]]]) -> None:
    folder, _, events = study
    expected = [
        (name, state) for name in CELLS for state in ("started", "failed" if name == "no-match" else "finished")
    ]
    assert [(event["cell"], event["state"]) for event in events] == expected
    assert "gate" in (folder / "cells" / "no-match" / FAILED).read_text()
    assert not any((folder / "cells" / name / FAILED).exists() for name in TRAINED)
    assert not list((folder / "locks").iterdir())


def test_nothing_is_left_of_a_cell_when_the_next_begins(study: tuple[Path, int, list[dict[str, Any]]]) -> None:
    """Or a worker would grow by a model with each cell."""
    folder, num_ranks, _ = study
    assert (folder / "engines.txt").read_text().split() == ["0"] * (len(CELLS) * num_ranks)


def test_the_base_is_read_once(study: tuple[Path, int, list[dict[str, Any]]]) -> None:
    """With ZeRO-2 each of several ranks reads all of it, which is another share than with ZeRO-3."""
    folder, num_ranks, _ = study
    num_read = {name: _events(folder / "cells" / name, "base_loaded")[0]["bytes_read"] for name in TRAINED}
    assert 0 < num_read["full"] < num_read["qv"], "only the matrices that are not quantized now"
    assert num_read["full-zero2"] == num_read["full"] * (2 if num_ranks > 1 else 0)
    assert (num_read["qkv-zero2"] > 0) is (num_read["qv-again"] > 0) is (num_ranks > 1)


def test_the_bits_are_those_of_runs_that_were_started_alone(
    lab: Lab, study: tuple[Path, int, list[dict[str, Any]]]
) -> None:
    folder, num_ranks, _ = study
    cells = {cell.name: cell for cell in read_cells(folder)}
    for name in ALONE:
        alone = lab.folder / f"alone-{num_ranks}" / name
        command = ["launch/train.py", "--config", str(folder / "recipe.yaml"), *cells[name].overrides]
        ended = fork_ranks([*command, f"run_dir={alone}"], num_ranks, alone / "logs", timeout=300, **lab.environment)
        assert {end.code for end in ended} == {0}, ended[0].output
        assert _results(folder / "cells" / name) == _results(alone), name
    qv, again, full = (_results(folder / "cells" / name) for name in ("qv", "qv-again", "full"))
    assert qv == again != full


def test_an_error_ends_the_process_and_the_next_goes_on(lab: Lab) -> None:
    study = make_study(lab, "study-error", {"broken": [], "good": []})
    (first,), events = work(lab, study)
    assert first.code == 1 and [event["state"] for event in events] == ["started"], first.output
    assert (study / "cells" / "broken" / FAILED).read_text().endswith("RuntimeError: step 2: the loss is nan\n")
    (second,), events = work(lab, study)
    found = [(event["cell"], event["state"]) for event in events]
    assert (second.code, found) == (0, [("good", "started"), ("good", "finished")]), second.output


def test_a_worker_whose_parent_is_gone_stops(lab: Lab) -> None:
    study = make_study(lab, "study-orphan", {"good": []})
    command: Sequence[str | Path] = ["-m", "qvtune.study.worker", study, "1", "2"]  # its parent is not process 1
    ended = fork_command(command, study / "worker", timeout=300, **lab.environment)
    assert ended.code == 75 and not (study / "cells").exists(), ended.output


def _events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def _results(run_dir: Path) -> Any:
    """Everything that was computed."""
    steps = [(entry["loss"], entry["grad_norm"], entry["lr"]) for entry in _events(run_dir, "step")]
    assert len(steps) == STEPS
    return steps, (run_dir / "eval_rows.jsonl").read_text()
