"""metrics.jsonl and eval_rows.jsonl of a run: how they are opened where the disk refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvtune.checkpoint.owner import take
from qvtune.checkpoint.state import TrainerState
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.report.json_lines import read_json_lines
from qvtune.train.recorder import EVAL_ROWS_FILE, recorder
from tests.support.processes import files_of_at_most

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("name", ["metrics.jsonl", EVAL_ROWS_FILE])
def test_a_disk_without_room_for_the_records_of_a_resumed_run_is_one_message(tmp_path: Path, name: str) -> None:
    """Both are copied when a run goes on; the originals stay, so that it can be started again."""
    sections = {"train": {"max_steps": 4}, "report": {"html": False, "trackers": []}}
    config = RunConfig.model_validate({"run_dir": str(tmp_path / "run"), **sections})
    state = TrainerState(max_steps=4, evaluations={2: {}})
    run: Any = SimpleNamespace(owner=take(tmp_path / "run"), run_dir=tmp_path / "run", state=state)
    path = tmp_path / "run" / name
    path.write_text('{"event": "eval", "step": 2}\n' * 100)
    refused = pytest.raises(UserError, match=r"run_dir: .*run cannot be written \(.*File too large\); make room")
    with files_of_at_most(600), refused, recorder(run, config):
        pass
    assert len(read_json_lines(path)) == 100
    with recorder(run, config) as record:
        record("step", step=3)
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 3
