"""What can go wrong in a cycle: one fault, drawn from the seed and the number of the cycle."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Words at the start of a heartbeat's text -> phase.
PHASES = {
    "checks, downloads and tokenization": "tokenizing",
    "loading of the base": "loading",
    "opening of the run folder": "opening",
    "start of DeepSpeed": "start of DeepSpeed",
    "step": "step",
    "evaluation": "evaluation",
    "generation": "generation",
    "checkpoint of step": "gathering",
    "writing of the checkpoint": "waiting for a save",
}
SAVE = "file operation"  # of rank 0 in checkpoints/ or its workspace: open to write, rename, fsync, ...
# Kind -> the phases in which it may strike; None: all.
KINDS: dict[str, tuple[str, ...] | None] = {
    "kill one rank": None,
    "kill all ranks": None,
    "kill in a save": (SAVE,),
    "SIGTERM": None,
    "SIGUSR1": None,
    "two signals": None,
    "SIGSTOP": ("loading", "step", "evaluation", "generation", "gathering"),
    "ENOSPC": (SAVE,),
    "EIO": (SAVE,),
    "damaged file": ("step", "evaluation"),
    "stale writer": ("step", "evaluation"),
    "NaN loss": ("step",),
    "NaN gradient": ("step",),
    "clock": None,
    "other ranks": ("step", "evaluation"),
}
LAUNCHER = "kill the launcher"  # the real one, whose ranks start cold; half a minute each
Counts = Mapping[str, Mapping[str, int]]  # rank -> phase -> events in a run that nothing disturbs


@dataclass(frozen=True)
class Fault:
    """Strikes at event ``nth`` (from 0) of ``phase`` on ``rank``. ``to_all``: signals go to all ranks.

    ``amount``: file operations that fail, seconds between two signals or of the clock's jump, ranks of the resumed run.
    """

    kind: str
    phase: str
    nth: int = 0
    rank: int = 0
    to_all: bool = False
    amount: float = 0.0
    detail: str = ""


def draw(seed: int, cycle: int, counts: Counts, *, launcher: bool) -> Fault:
    """The fault of a cycle. Kinds take turns, in an order of the seed's."""
    kinds = [*KINDS, *([LAUNCHER] if launcher else [])]
    random.Random(seed).shuffle(kinds)
    kind, chance = kinds[cycle % len(kinds)], random.Random(f"{seed}/{cycle}")
    if kind == LAUNCHER:
        return Fault(kind, "step", amount=chance.uniform(0, 3))
    rank = 0 if KINDS[kind] == (SAVE,) else chance.choice([0, 1])
    of_rank = counts[str(rank)]
    phase = chance.choice(sorted((set(PHASES.values()) if KINDS[kind] is None else set(KINDS[kind])) & of_rank.keys()))
    nth = chance.randrange(of_rank[phase])
    if kind in ("damaged file", "stale writer", "other ranks"):  # when there is a checkpoint
        nth = chance.randrange(of_rank[phase] // 2, of_rank[phase])
    amounts: dict[str, Any] = {
        "ENOSPC": lambda: chance.randint(1, 80),
        "EIO": lambda: chance.randint(1, 80),
        "two signals": lambda: chance.choice([0.05, 1.0, 3.5]),
        "clock": lambda: chance.choice([-1, 1]) * chance.uniform(60, 10**7),
        "other ranks": lambda: chance.choice([1, 3]),
    }
    amount = amounts.get(kind, lambda: 0)()
    detail = chance.choice(["flip", "truncate", "remove"]) if kind == "damaged file" else ""
    return Fault(kind, phase, nth, rank, chance.random() < 0.5, amount, detail)
