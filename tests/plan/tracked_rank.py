"""One rank of real runs, of which the bytes of all tensors are tracked: JOBS.json FOLDER."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qvtune.config.schema import RunConfig
from qvtune.distributed import process_group
from qvtune.plan.tracker import Tracker
from qvtune.train import loop


def last_step(config: dict[str, Any]) -> dict[str, int]:
    """Largest sum of the bytes of all tensors during the last optimizer step, and the bytes that it gathers."""
    tracker, found = Tracker(), {}

    def step(*arguments: Any) -> Any:
        tracker.restart()
        result = optimizer_step(*arguments)
        tracked = tracker.tracked
        found.update(peak=max(peak.total() for peak in tracked.peaks.values()), gathered=tracked.gathered.total())
        return result

    optimizer_step: Callable[..., Any] = loop._optimizer_step
    with patch.object(loop, "_optimizer_step", step), tracker:
        assert loop.train(RunConfig.model_validate(config)) == loop.EXIT_DONE
    return found


def main() -> None:
    """Run the jobs."""
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    process_group.start()
    found = []
    for job in jobs:
        found.append(last_step(job))
        (folder / f"tracked-{process_group.rank()}.json").write_text(json.dumps(found))
    process_group.stop()


if __name__ == "__main__":
    main()
