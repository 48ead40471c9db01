"""The shipped templates in the tests' cluster, with the model and the data of tests/distributed."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.cluster import GPUS_PER_HOST, Cluster, Job
from tests.support.forks import fork_ranks
from tests.support.lab import Lab, make_lab
from tests.support.processes import REPOSITORY

MAX_STEPS = 24  # some seconds: a fault that waits for step 7 finds the run at work
SAVE_EVERY = 6
CLUSTER_ENV = """
export PATH={bin}:$PATH
export QVTUNE_CACHE={cache}
export QVTUNE_PROCS_PER_NODE=${{QVTUNE_PROCS_PER_NODE:-1}}
export QVTUNE_TIMEOUT_SECONDS=${{QVTUNE_TIMEOUT_SECONDS:-120}}
export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
"""


@dataclass(frozen=True)
class Site:
    """A checkout on the cluster's shared file system, whose slurm/cluster.env fits the cluster."""

    cluster: Cluster
    lab: Lab
    references: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """The checkout, from which jobs are submitted."""
        return self.lab.folder / "home"

    def train(
        self, name: str, *overrides: str, nodes: int = 2, options: tuple[str, ...] = (), **environment: str
    ) -> str:
        """``sbatch slurm/train.sbatch`` of the recipe into ``lab.run_dir(name)``; the job's id."""
        options = (f"--nodes={nodes}", f"--gpus-per-node={GPUS_PER_HOST}", f"--job-name={name}", *options)
        arguments = ["slurm/train.sbatch", "../recipe.yaml", f"run_dir={self.lab.run_dir(name)}", *overrides]
        return self.cluster.sbatch(*options, *arguments, cwd=self.home, environment=environment)

    def steps(self, name: str) -> list[int]:
        """The steps that the run has recorded so far, in the order of the file."""
        path = self.lab.run_dir(name) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry["step"] for entry in map(json.loads, lines) if entry["event"] == "step"]

    def wait_for_step(self, job: str, name: str, step: int, timeout: float = 300) -> Job:
        """Until the run has done this step."""

        def reached(now: Job) -> bool:
            deadline = time.monotonic() + 2  # the file is read more often than Slurm is asked
            while max(self.steps(name), default=0) < step:
                if now.finished:
                    raise AssertionError(f"ended before step {step}\n{now.story}")
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            return True

        return self.cluster.wait_for_job(job, reached, f"at step {step}", timeout)

    def losses(self, name: str, max_steps: int = MAX_STEPS) -> list[float]:
        """Of all steps; what a step gave when it ran last."""
        last = {entry["step"]: entry["loss"] for entry in self.lab.events(name, "step")}
        assert list(last) == list(range(1, max_steps + 1)), last
        return list(last.values())

    def reference(self, num_ranks: int, max_steps: int = MAX_STEPS) -> list[float]:
        """The losses of a run that is not interrupted, of local processes without Slurm."""
        if (num_ranks, max_steps) not in self.references:
            name = f"reference-{num_ranks}-{max_steps}"
            command: list[str | Path] = [REPOSITORY / "launch" / "train.py"]
            command += ["--config", self.lab.folder / "recipe.yaml"]
            command += [f"run_dir={self.lab.run_dir(name)}", f"train.max_steps={max_steps}"]
            folder = self.lab.folder / "output" / name
            for ended in fork_ranks(command, num_ranks, folder, timeout=240, **self.lab.environment):
                assert ended.code == 0, ended.output
            self.references[num_ranks, max_steps] = self.losses(name, max_steps)
        return self.references[num_ranks, max_steps]


def make_site(cluster: Cluster, folder: Path) -> Site:
    """The checkout is a copy of this repository's folders; only cluster.env is the site's."""
    lab = make_lab(folder, num_layers=1)
    site = Site(cluster, lab)
    changes: dict[str, Any] = {"train__max_steps": MAX_STEPS, "train__save_every": SAVE_EVERY}
    changes |= {"data__eval": str(folder / "eval.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(lab.config("recipe", **changes)))
    for name in ("launch", "src", "ds_configs", "slurm"):
        shutil.copytree(REPOSITORY / name, site.home / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (site.home / "slurm" / "cluster.env").write_text(
        CLUSTER_ENV.format(bin=Path(sys.executable).parent, cache=lab.folder / "cache")
    )
    return site
