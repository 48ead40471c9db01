"""The command, a recipe for it, and the launchers that it runs under."""

from pathlib import Path

import pytest
import torch
import yaml

from qvtune.distributed.ports import any_free_port
from tests.support.forks import fork_command
from tests.support.lab import Lab, make_lab
from tests.support.processes import REPOSITORY, Finished, run_command

TRAIN = REPOSITORY / "launch" / "train.py"
LAUNCHERS: dict[str, list[str]] = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", f"--master_port={any_free_port()}"],  # its default may be in use
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "python": ["python"],
}

# It gives its ranks the GPUs by number, whatever is hidden from it.
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="deepspeed would run it on GPUs; run on a machine without"
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Beside the lab's model and data, ``recipe.yaml``: two steps with a checkpoint after each."""
    lab = make_lab(tmp_path_factory.mktemp("launch"))
    changes = {"train__max_steps": 2, "train__save_every": 1, "data__eval": str(lab.folder / "eval.jsonl")}
    (lab.folder / "recipe.yaml").write_text(yaml.safe_dump(lab.config("recipe", **changes)))
    return lab


def train(lab: Lab, launcher: str, name: str, *overrides: str) -> Finished:
    """Run the recipe under a launcher into ``lab.run_dir(name)``."""
    launched = [*LAUNCHERS[launcher], *command(lab, name, *overrides)]
    return run_command(launched, lab.folder / "output" / name, timeout=240, **lab.environment)


def train_forked(lab: Lab, name: str, *overrides: str, **environment: str) -> Finished:
    """Run the recipe as one process without a launcher, in a fork of the warm interpreter."""
    folder = lab.folder / "output" / name
    return fork_command(command(lab, name, *overrides), folder, timeout=240, **lab.environment, **environment)


def command(lab: Lab, name: str, *overrides: str) -> list[str | Path]:
    """The recipe into ``lab.run_dir(name)``: what follows ``python`` or a launcher."""
    return [TRAIN, "--config", lab.folder / "recipe.yaml", f"run_dir={lab.run_dir(name)}", *overrides]
