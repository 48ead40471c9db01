"""What is refused before anything is loaded or written."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from qvtune.config.schema import RunConfig
from qvtune.distributed.stop import StopRequest
from qvtune.errors import UserError
from qvtune.train.prepare import plan
from tests.support.tiny import ENCODERS, make_model_folder


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ENCODERS)
def test_a_language_model_is_no_encoder(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path / family, family)
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "run_dir": str(tmp_path / "run"),
        }
    )
    with pytest.raises(
        UserError, match=r"task: causal_lm .* is an encoder.*llama.*gemma3_text\) in model\.name_or_path"
    ):
        plan(config, StopRequest())
    assert not (tmp_path / "run").exists()
