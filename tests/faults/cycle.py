"""A cycle: the real command on two ranks with a fault, started again until it is done; then everything is compared."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load

from qvtune.checkpoint.folder import complete_checkpoints, newest_whole, verify
from qvtune.distributed.ports import any_free_port
from qvtune.errors import HUNG_EXIT_CODE, UserError
from qvtune.report.json_lines import read_json_lines
from qvtune.report.metrics import read_metrics
from tests.faults.kinds import LAUNCHER, Counts, Fault
from tests.support.forks import Fork, started_ranks
from tests.support.lab import Lab, make_lab
from tests.support.processes import REPOSITORY, started

TRAIN = REPOSITORY / "launch" / "train.py"
NUM_RANKS, NUM_STEPS, HANG_SECONDS = 2, 6, 6
_START_SECONDS, _GRACE_SECONDS = 400, 20  # of a start; of the other ranks once one has ended, as launchers have it
_MOST_STARTS = 4
_ROUNDING = 2e-4  # other ranks add in another order, over NUM_STEPS steps
_OF_MACHINE = ("time", "seconds", "peak_rss_bytes", "peak_device_bytes")
# Exit codes of the first start beside 0, which a run gives that was faster than the fault.
_CODES: dict[str, set[int]] = {
    "SIGTERM": {75},
    "SIGUSR1": {75},
    "two signals": {75, 128 + signal.SIGTERM, 128 + signal.SIGUSR1},
    "SIGSTOP": {HUNG_EXIT_CODE, -signal.SIGKILL},
    "ENOSPC": {75, 2},
    "EIO": {75, 2},
    "NaN loss": {1},
    "NaN gradient": {1},
    "clock": set(),
}


@dataclass
class Outcome:
    """What a cycle has shown. ``problems``: all that must not be; ``codes``: exit codes of each start's ranks."""

    fault: Fault
    problems: list[str] = field(default_factory=list)
    codes: list[list[int | None]] = field(default_factory=list)
    exact: bool = False
    struck: bool = True
    lost_steps: int = 0
    damaged: int = 0


class Faults:
    """A laboratory with the run that nothing disturbs."""

    def __init__(self, folder: Path) -> None:
        self.lab: Lab = make_lab(folder)
        config = self.lab.config(
            "recipe",
            train__max_steps=NUM_STEPS,
            train__save_every=2,
            train__eval_every=2,
            train__eval_rows=True,
            train__generate={"prompts": ["what does it do", "hello"], "every": 3, "max_new_tokens": 4},
            data__eval=str(folder / "eval.jsonl"),
            checkpoint={"keep": 2},
        )
        self._recipe = folder / "recipe.yaml"
        self._recipe.write_text(yaml.safe_dump(config))
        codes = self._start("undisturbed", "undisturbed", None)
        assert codes == [0] * NUM_RANKS, self._errors("undisturbed")
        self.reference = record(self.lab.run_dir("undisturbed"))
        assert [entry["step"] for entry in self.reference["step"]] == list(range(1, NUM_STEPS + 1))
        assert len(self.reference["eval"]) == len(self.reference["generation"]) + 1 == 4
        self.counts: Counts = {
            str(rank): json.loads((self._output("undisturbed") / f"counts-{rank}.json").read_text())
            for rank in range(NUM_RANKS)
        }

    def cycle(self, number: int, fault: Fault) -> Outcome:
        """Run one; its folders are deleted where nothing is wrong."""
        name, outcome = f"cycle-{number}", Outcome(fault)
        if fault.kind == LAUNCHER:
            outcome.codes.append(self._kill_launcher(name, fault))
        elif fault.kind == "stale writer":
            outcome.codes += self._beside_a_stale_run(name, fault)
        else:
            outcome.codes.append(self._start(name, f"{name}.1", fault))
            self._check_codes(outcome, f"{name}.1")
        outcome.struck = fault.kind == LAUNCHER or (self._output(f"{name}.1") / f"struck-{fault.rank}").exists()
        self._until_done(name, outcome)
        if not outcome.problems:
            self.compare(name, outcome)
        if not outcome.problems:
            for folder in self.lab.folder.glob(f"*/{name}*"):
                shutil.rmtree(folder)
        return outcome

    def _until_done(self, name: str, outcome: Outcome) -> None:
        fault, run_dir = outcome.fault, self.lab.run_dir(name)
        while outcome.codes[-1] and any(outcome.codes[-1]):
            if len(outcome.codes) == _MOST_STARTS:
                outcome.problems.append(f"not done after {_MOST_STARTS} starts")
                return
            if fault.kind != LAUNCHER:  # whose ranks may still be at work
                outcome.damaged += num_damaged(run_dir / "checkpoints")
            if fault.kind == "damaged file":
                damage(run_dir / "checkpoints", fault)
            before, _ = newest_whole(run_dir / "checkpoints")
            expected = int(before.name.removeprefix("step-")) if before else 0
            start = f"{name}.{len(outcome.codes) + 1}"
            num_ranks = int(fault.amount) if fault.kind == "other ranks" else NUM_RANKS
            outcome.codes.append(self._start(name, start, None, num_ranks))
            starts = read_metrics(run_dir, "run_start") if (run_dir / "metrics.jsonl").exists() else []
            if any(outcome.codes[-1]) or not starts:
                outcome.problems.append(f"start {start} ended with {outcome.codes[-1]}: {self._errors(start)}")
                return
            outcome.lost_steps += max(0, expected - starts[-1]["step"])

    def _check_codes(self, outcome: Outcome, start: str) -> None:
        """The first code that is not 0 must be one that the fault explains, and no error may be a traceback."""
        allowed, fault, codes = _CODES.get(outcome.fault.kind), outcome.fault, outcome.codes[0]
        if allowed is None:  # killed
            return
        if None in codes:
            outcome.problems.append(f"a rank had not ended after {_START_SECONDS} s")
        unexpected = [code for code in codes if code not in (allowed | {0, -signal.SIGKILL})]
        if fault.kind in ("two signals", "SIGSTOP") and allowed & set(codes):
            unexpected = []  # the others lose their peer; a launcher would end them
        if unexpected or (fault.kind == "clock" and any(codes)):
            outcome.problems.append(f"exit codes {codes}: {self._errors(start)}")
        elif "Traceback" in self._errors(start) and not fault.kind.startswith("NaN") and fault.kind != "SIGSTOP":
            outcome.problems.append(f"a traceback: {self._errors(start)}")

    def compare(self, name: str, outcome: Outcome) -> None:
        """Note in ``outcome`` what of the finished run ``name`` is not as in the undisturbed one."""
        run_dir = self.lab.run_dir(name)
        checkpoints = run_dir / "checkpoints"
        left = [path.name for path in checkpoints.glob(".*") if path.name.startswith(".step-")]
        aside = [path.name for path in checkpoints.glob("*.damaged*")]
        outcome.damaged += (
            num_damaged(checkpoints) + len(left) + (len(aside) if outcome.fault.kind != "damaged file" else 0)
        )
        found = record(run_dir)
        if outcome.fault.kind == "other ranks":
            outcome.exact = close(found, self.reference)
        else:
            outcome.exact = found == self.reference
        if not outcome.exact:
            differing = [key for key in self.reference if found[key] != self.reference[key]]
            outcome.problems.append(f"differs from the undisturbed run in {', '.join(differing)}")
        if outcome.lost_steps or outcome.damaged:
            outcome.problems.append(f"{outcome.lost_steps} steps lost, {outcome.damaged} damaged folders")

    # ---- starts

    def _words(self, name: str, output: Path, fault: Fault | None) -> list[str | Path]:
        hang = {"SIGSTOP": HANG_SECONDS, "clock": 120}.get(fault.kind, "null") if fault is not None else "null"
        settings = [f"run_dir={self.lab.run_dir(name)}", f"train.hang_seconds={hang}"]
        return ["-m", "tests.faults.rank", output, TRAIN, "--config", self._recipe, *settings]

    def _output(self, start: str) -> Path:
        return self.lab.folder / "output" / start

    def _environment(self, start: str, fault: Fault | None) -> dict[str, str]:
        """An empty cache, where tokenizing is to be disturbed."""
        cold = fault is None or fault.phase != "tokenizing"
        cache = self.lab.folder / "cache" if cold else self._output(start) / "cache"
        return {"QVTUNE_CACHE": str(cache)}

    def _start(self, name: str, start: str, fault: Fault | None, num_ranks: int = NUM_RANKS) -> list[int | None]:
        """Exit codes of the ranks, as a launcher leaves them: the first that fails ends the others, after a while."""
        output = self._output(start)
        output.mkdir(parents=True)
        if fault is not None:
            (output / "fault.json").write_text(json.dumps(asdict(fault)))
        words = self._words(name, output, fault)
        with started_ranks(words, num_ranks, output, **self._environment(start, fault)) as ranks:
            _wait(ranks)
            return [rank.returncode for rank in ranks]

    def _beside_a_stale_run(self, name: str, fault: Fault) -> list[list[int | None]]:
        """All ranks of the first start stand still until the second, in the same folder, is done."""
        output = self._output(f"{name}.1")
        output.mkdir(parents=True)
        (output / "fault.json").write_text(json.dumps(asdict(fault)))
        words, environment = self._words(name, output, fault), self._environment(name, fault)
        with started_ranks(words, NUM_RANKS, output, **environment) as ranks:
            deadline = time.monotonic() + _START_SECONDS
            while not (output / f"struck-{fault.rank}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            for rank in ranks:
                _signal(rank.pid, signal.SIGSTOP)
            second = self._start(name, f"{name}.2", None)
            for rank in ranks:
                _signal(rank.pid, signal.SIGCONT)
            _wait(ranks)
            return [[rank.returncode for rank in ranks], second]

    def _kill_launcher(self, name: str, fault: Fault) -> list[int | None]:
        """SIGKILL to ``deepspeed`` alone, some time after the first checkpoint; its ranks may live on for a while."""
        words = ["--config", self._recipe, f"run_dir={self.lab.run_dir(name)}"]
        port = f"--master_port={any_free_port()}"
        command = ["deepspeed", "--num_gpus", str(NUM_RANKS), port, TRAIN, *words]
        with started(command, self._output(f"{name}.1"), **self._environment(name, fault)) as launcher:
            latest, deadline = self.lab.run_dir(name) / "checkpoints" / "latest", time.monotonic() + _START_SECONDS
            while not latest.exists() and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(fault.amount)
            launcher.kill()
            return [launcher.wait()]

    def _errors(self, start: str) -> str:
        files = sorted(self._output(start).glob("stderr*"))
        return "\n".join(file.read_text(errors="replace")[-3000:] for file in files)


def _wait(ranks: Sequence[Fork]) -> None:
    """Until all have ended, or one has failed and the others had their time."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        if None not in codes:
            return
        if any(codes):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.05)


def _signal(pid: int, number: signal.Signals) -> None:
    """To the rank and its watcher."""
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def num_damaged(checkpoints: Path) -> int:
    """Checkpoints whose files are not those of their manifests."""
    count = 0
    for folder in complete_checkpoints(checkpoints):
        try:
            verify(folder)
        except UserError:
            count += 1
    return count


def damage(checkpoints: Path, fault: Fault) -> None:
    """Do ``fault.detail`` to a file of the newest checkpoint, where there is another one before it."""
    found = complete_checkpoints(checkpoints)
    if len(found) < 2:
        return
    chance = random.Random(fault.nth)
    file = chance.choice(sorted(found[-1].iterdir()))
    content = bytearray(file.read_bytes())
    if fault.detail == "remove":
        file.unlink()
    elif fault.detail == "truncate":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)


def record(run_dir: Path) -> dict[str, Any]:
    """All that two runs must share: what metrics.jsonl says of steps, evaluations and generations, what
    eval_rows.jsonl says of documents, and the files of the last checkpoint."""
    events = {
        kind: [_of_training(one) for one in read_metrics(run_dir, kind)] for kind in ("step", "eval", "generation")
    }
    for entries in events.values():
        entries.sort(key=lambda entry: entry["step"])
    last = complete_checkpoints(run_dir / "checkpoints")[-1]
    files = {name: (last / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")}
    return {**events, "eval_rows": read_json_lines(run_dir / "eval_rows.jsonl"), "last": last.name, **files}


def _of_training(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _OF_MACHINE}


def close(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """The same steps, with losses, norms and adapters that differ by rounding."""
    values = [[[e["step"], e["loss"], e["grad_norm"]] for e in one["step"]] for one in (found, expected)]
    if found["last"] != expected["last"] or len(values[0]) != len(values[1]):
        return False
    near = partial(torch.allclose, rtol=_ROUNDING, atol=_ROUNDING)
    adapters = [load(one["adapter_model.safetensors"]) for one in (found, expected)]
    return near(*map(torch.tensor, values)) and all(near(adapters[0][name], adapters[1][name]) for name in adapters[1])
