"""A few seeded faults; `make faults` does two hundred, of every kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cycle import NUM_STEPS, Faults, Outcome, damage, num_damaged, record
from tests.faults.kinds import KINDS, Fault, draw
from tests.launch.conftest import without_gpu

pytestmark = [pytest.mark.distributed, without_gpu]

SEED, CYCLES = 3, 20


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", range(CYCLES))
def test_a_fault_costs_no_step_and_changes_nothing(faults: Faults, number: int) -> None:
    outcome = faults.cycle(number, draw(SEED, number, faults.counts, launcher=False))
    assert not outcome.problems, f"{outcome.fault}, exit codes {outcome.codes}\n" + "\n".join(outcome.problems)
    assert outcome.exact


def test_every_kind_is_drawn_and_the_same_again(faults: Faults) -> None:
    drawn = [draw(SEED, number, faults.counts, launcher=False) for number in range(CYCLES)]
    assert {fault.kind for fault in drawn} == KINDS.keys()
    assert drawn == [draw(SEED, number, faults.counts, launcher=False) for number in range(CYCLES)]
    assert drawn != [draw(SEED + 1, number, faults.counts, launcher=False) for number in range(CYCLES)]


def test_faults_can_strike_in_every_phase(faults: Faults) -> None:
    least = {"tokenizing": 1, "loading": 10, "step": NUM_STEPS, "evaluation": 4, "generation": 4, "file operation": 60}
    for phase, count in least.items():
        assert faults.counts["0"][phase] >= count, phase


def test_what_differs_is_noticed(faults: Faults) -> None:
    """A loss that is off by one unit in the last place, a step that is missing, a file that is not what was written."""

    def compared(name: str) -> Outcome:
        outcome = Outcome(Fault("kill one rank", "step"))
        faults.compare(name, outcome)
        return outcome

    undisturbed = faults.lab.run_dir("undisturbed")
    for name in ("same", "loss", "missing", "damaged"):
        shutil.copytree(undisturbed, faults.lab.run_dir(name), symlinks=True)
    assert compared("same").exact and not compared("same").problems
    metrics = faults.lab.run_dir("loss") / "metrics.jsonl"
    entries = _lines(metrics)
    last = max(number for number, entry in enumerate(entries) if entry["event"] == "step")
    entries[last]["loss"] *= 1 + 2**-52
    _rewrite(metrics, entries)
    assert compared("loss").problems == ["differs from the undisturbed run in step"]
    metrics = faults.lab.run_dir("missing") / "metrics.jsonl"
    _rewrite(metrics, [entry for entry in _lines(metrics) if (entry["event"], entry.get("step")) != ("step", 3)])
    assert compared("missing").problems == ["differs from the undisturbed run in step"]
    checkpoints = faults.lab.run_dir("damaged") / "checkpoints"
    damage(checkpoints, Fault("damaged file", "step", detail="truncate"))
    assert num_damaged(checkpoints) == 1 and compared("damaged").damaged == 1
    assert record(undisturbed) == faults.reference


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rewrite(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
