"""Real runs on forked CPU ranks that track the bytes of all their tensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.forks import fork_ranks


def tracked(configs: Sequence[dict[str, Any]], num_ranks: int, folder: Path) -> list[list[dict[str, int]]]:
    """Train each configuration on ``num_ranks``; what tests/plan/tracked_rank.py found, for each run and rank."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(list(configs)))
    command: list[str | Path] = ["-m", "tests.plan.tracked_rank", folder / "jobs.json", folder]
    for end in fork_ranks(command, num_ranks, folder, timeout=3600, QVTUNE_CACHE=str(folder.parent / "cache")):
        assert end.code == 0, end.output
    of_ranks = [json.loads((folder / f"tracked-{rank}.json").read_text()) for rank in range(num_ranks)]
    return [list(of_run) for of_run in zip(*of_ranks, strict=True)]
