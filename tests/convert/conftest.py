"""Checkpoints of the tiny model, written as training writes them, with factors that are not zero."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvtune.checkpoint import folder, state
from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.model.adapters import add_adapters, trainable
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.train.run_folder import trajectory_settings

State = dict[str, dict[str, torch.Tensor]]
MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(
        base: Path,
        *,
        dtype: torch.dtype = torch.float32,
        method: str = "lora",
        adapter: dict[str, Any] | None = None,
        edit: Callable[[State], object] = lambda state: None,
        edit_config: Callable[[Any], object] = lambda peft_config: None,
        **settings: Any,
    ) -> Path:
        """Write ``tmp_path/run`` with one checkpoint, step 3; ``settings`` are those of ``model`` and ``data``."""
        data = {"eval": settings.pop("eval", None), "max_length": 64}
        config = RunConfig.model_validate(
            {
                "run_dir": str(tmp_path / "run"),
                "model": {"name_or_path": str(base), **settings},
                "adapter": adapter or {"method": method, "rank": 4, "alpha": 6},
                "train": {"max_steps": 3},
                "data": data,
            }
        )
        opened = open_base(base, config.model, dtype, "sdpa")
        _, content = fill(opened, Whole(torch.device("cpu")), dtype)
        model: Any = add_adapters(opened.skeleton, config.adapter, str(base), seed=0)
        generator = torch.Generator().manual_seed(1)
        gathered = {
            name: {
                key: 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
                for key in ("value", "master", "exp_avg", "exp_avg_sq")
            }
            for name, parameter in trainable(model)
        }
        assert adapter or len(gathered) == 8
        edit(gathered)
        peft_config = model.peft_config["default"]
        edit_config(peft_config)
        trainer = state.TrainerState(step=3, trajectory=trajectory_settings(config))
        run_dir = tmp_path / "run"
        folder.write(run_dir / "checkpoints", 3, lambda path: state.save(path, gathered, peft_config, trainer, content))
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        return run_dir

    return make
