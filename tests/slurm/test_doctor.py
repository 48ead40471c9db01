"""launch/doctor.py on all hosts of a job: finds each fault and names the host; no false alarm where there is none."""

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import GPUS_PER_HOST, HOSTS, LOGIN, Cluster
from tests.support.lab import Lab, make_lab
from tests.support.processes import REPOSITORY

MASTER, *OTHERS = HOSTS
PORT = "23456"
# What a host's Python does before anything else: faults that have no place outside of the process.
SITECUSTOMIZE = """
import os, socket, time
host = socket.gethostname()
if host == os.environ.get("TEST_LATE_CLOCK"):
    right = time.time
    time.time = lambda: right() - 300
if host == os.environ.get("TEST_FEWER_GPUS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
if host == os.environ.get("TEST_SILENT"):
    os._exit(0)
"""


@dataclass(frozen=True)
class Diagnosis:
    """What srun returned, and the table's rows: (status, check, hosts, found)."""

    code: int
    output: str
    rows: tuple[tuple[str, ...], ...]

    def failed(self, host: str) -> list[str]:
        """The checks that have failed on a host, with what was found."""
        return [f"{row[1]}: {row[3]}" for row in self.rows if row[0] == "FAIL" and host in row[2].split(", ")]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("doctor"))
    (lab.folder / "recipe.yaml").write_text(yaml.safe_dump(lab.config("run")))
    lab.run_dir("run").mkdir(parents=True)
    (lab.folder / "site").mkdir()
    (lab.folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return lab


def examine(cluster: Cluster, lab: Lab, *options: str, nodes: int = len(HOSTS), **environment: str) -> Diagnosis:
    """Run the doctor on all hosts, as slurm/train.sbatch does."""
    step = [f"--nodes={nodes}", "--partition=all", "--ntasks-per-node=1", f"--gpus-per-node={GPUS_PER_HOST}"]
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}",
        "PYTHONPATH": f"{lab.folder / 'site'}{os.pathsep}{REPOSITORY / 'src'}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",  # no row of the table is folded
        "MASTER_PORT": PORT,
        "QVTUNE_PROCS_PER_NODE": "1",
        **environment,
    }
    command = ["srun", *step, "python", REPOSITORY / "launch" / "doctor.py", "--config", lab.folder / "recipe.yaml"]
    done = cluster.run(LOGIN, *command, *options, check=False, timeout=120, cwd=lab.folder, environment=variables)
    cells = (tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in done.stdout.splitlines() if "│" in line)
    return Diagnosis(done.returncode, f"{done.stdout}\n{done.stderr}", tuple(cells))


@contextmanager
def mounted(cluster: Cluster, host: str, *what: str | Path) -> Iterator[None]:
    """``mount WHAT...`` on one host; the last word is the place."""
    cluster.run(host, "mount", *what)
    yield
    cluster.run(host, "umount", what[-1])


@pytest.fixture(scope="session")
def healthy(cluster: Cluster, lab: Lab) -> Diagnosis:
    return examine(cluster, lab, nodes=3)


VERSION, NO_NAME, LATE_CLOCK, NOT_SHARED, FEWER_GPUS = OTHERS


@pytest.fixture(scope="session")
def sick(cluster: Cluster, lab: Lab) -> Diagnosis:
    """Five hosts with a fault each."""
    metadata = Path(str(importlib.metadata.distribution("peft").locate_file("")))
    metadata = next(metadata.glob("peft-*.dist-info")) / "METADATA"
    right = importlib.metadata.version("peft")
    (lab.folder / "METADATA").write_text(metadata.read_text().replace(f"Version: {right}", "Version: 0.21.99", 1))
    hosts = [line for line in (cluster.folder / "etc" / "hosts").read_text().splitlines() if MASTER not in line]
    (lab.folder / "hosts").write_text("\n".join(hosts) + "\n")
    with ExitStack() as faults:
        faults.enter_context(mounted(cluster, VERSION, "--bind", lab.folder / "METADATA", metadata))
        faults.enter_context(mounted(cluster, NO_NAME, "--bind", lab.folder / "hosts", "/etc/hosts"))
        faults.enter_context(mounted(cluster, NOT_SHARED, "-t", "tmpfs", "tmpfs", lab.run_dir("run")))
        return examine(cluster, lab, TEST_LATE_CLOCK=LATE_CLOCK, TEST_FEWER_GPUS=FEWER_GPUS)


CLOSED_PORT, FULL_DISK, SILENT = OTHERS[:3]


@pytest.fixture(scope="session")
def sicker(cluster: Cluster, lab: Lab) -> Diagnosis:
    """Three hosts of six with other faults."""
    rule = ["pref", "10", "ipproto", "tcp", "dport", PORT, "prohibit"]
    cluster.run(CLOSED_PORT, "ip", "rule", "add", *rule)
    with mounted(cluster, FULL_DISK, "-t", "tmpfs", "-o", "size=1m", "tmpfs", lab.run_dir("run")):
        cluster.run(FULL_DISK, "dd", "if=/dev/zero", f"of={lab.run_dir('run')}/old", "bs=1k", "count=1016")
        diagnosis = examine(cluster, lab, TEST_SILENT=SILENT)
    cluster.run(CLOSED_PORT, "ip", "rule", "del", *rule)
    return diagnosis


def test_a_healthy_cluster_may_go(healthy: Diagnosis) -> None:
    assert healthy.code == 0, healthy.output
    assert not any(row[0] == "FAIL" for row in healthy.rows) and "\nGO\n" in healthy.output, healthy.output
    assert "error" not in healthy.output, healthy.output


def test_every_check_was_made(healthy: Diagnosis) -> None:
    made = {row[1] for row in healthy.rows}
    assert made >= {
        *("versions", "ranks", "GPUs", "attention", "data", "base", "memory", "disk", "file speed", "rename", "clock"),
        *("master's port", "resolve master", "reach master", "between nodes", "run folder shared", "clocks"),
        *("collective", "same on all"),
    }, healthy.output


def test_nothing_is_left_in_the_run_folder(healthy: Diagnosis, sick: Diagnosis, lab: Lab) -> None:
    assert list(lab.run_dir("run").iterdir()) == []


@pytest.mark.parametrize(
    ("host", "found"),
    [
        (VERSION, "same peft: 0.21.99 here, on most nodes"),
        (NO_NAME, f"resolve master: {MASTER}"),
        (LATE_CLOCK, "clock: this node's clock is -300.0 s"),
        (LATE_CLOCK, "clocks: against the master's: "),
        (NOT_SHARED, "run folder shared: sees the files of nodes [4] only"),
        (FEWER_GPUS, "GPUs: CUDA_VISIBLE_DEVICES=0,1 leaves 2 of 8 visible"),
    ],
)
def test_the_sick_host_is_named(sick: Diagnosis, host: str, found: str) -> None:
    assert any(line.startswith(found) for line in sick.failed(host)), sick.output


def test_only_the_sick_hosts_are_to_be_excluded(sick: Diagnosis) -> None:
    assert sick.code == 1, sick.output
    assert sick.failed(MASTER) == [], sick.output
    assert f"--exclude={','.join(OTHERS)}" in sick.output
    numbers = {host: len(sick.failed(host)) for host in OTHERS}
    assert numbers == {VERSION: 1, NO_NAME: 1, LATE_CLOCK: 2, NOT_SHARED: 1, FEWER_GPUS: 1}, sick.output


@pytest.mark.parametrize(
    ("host", "found"),
    [
        (CLOSED_PORT, f"reach master: {MASTER} (10.77.0.11) port {PORT}: "),
        (FULL_DISK, "disk: 0.00 GB free"),
        (SILENT, "report: none within"),
    ],
)
def test_the_sicker_host_is_named(sicker: Diagnosis, host: str, found: str) -> None:
    assert any(line.startswith(found) for line in sicker.failed(host)), sicker.output
    assert f"--exclude={','.join((CLOSED_PORT, FULL_DISK, SILENT))}\n" in sicker.output


def test_fewer_gpus_than_expected_everywhere(cluster: Cluster, lab: Lab) -> None:
    """Nobody is worse than the others: there is nothing to exclude."""
    diagnosis = examine(cluster, lab, "--gpus-per-node", str(GPUS_PER_HOST + 1), nodes=2)
    assert diagnosis.code == 1, diagnosis.output
    (row,) = [row for row in diagnosis.rows if row[0] == "FAIL"]
    assert row[1:4] == ("GPUs", "all", f"Slurm has granted {GPUS_PER_HOST} of the {GPUS_PER_HOST + 1} requested")
    assert "--exclude" not in diagnosis.output.split("NO-GO")[1]
