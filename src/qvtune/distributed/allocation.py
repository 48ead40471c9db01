"""The nodes of this job step and what was requested for each, from Slurm's variables; else this machine alone."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from qvtune.distributed.ports import port_of_job
from qvtune.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """The nodes of this job step, seen from one of them.

    Attributes:
        node: index of this node in ``hosts``; the first host is the master.
        port: of the master, for this job.
        gpus_requested, gpus_granted: per node; None if unknown.
        processes: ranks per node.
        on_cpus: whether these ranks run on CPUs although the node may have GPUs.
    """

    node: int
    hosts: tuple[str, ...]
    job: str
    port: int
    gpus_requested: int | None
    gpus_granted: int | None
    processes: int
    on_cpus: bool

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return len(self.hosts) * self.processes


def find_allocation(nodes: int | None, gpus_per_node: int | None, environment: Mapping[str, str]) -> Allocation:
    """The allocation of this process. ``nodes`` and ``gpus_per_node``: the expected numbers; None: those of the job.

    If ``QVTUNE_PROCS_PER_NODE`` (slurm/cluster.env) differs from the GPUs per node, the ranks run on CPUs.

    Raises UserError if a step of several nodes does not have one process per node, or has fewer nodes than expected.
    """
    in_step = "SLURM_STEP_NODELIST" in environment
    hosts = _expand(environment["SLURM_STEP_NODELIST"]) if in_step else (socket.gethostname(),)
    node = int(environment["SLURM_PROCID"]) if in_step else 0
    problems = []
    if in_step and int(environment["SLURM_NTASKS"]) != len(hosts):
        problems.append(
            f"{environment['SLURM_NTASKS']} processes on {len(hosts)} nodes; start one per node: "
            "srun --ntasks-per-node=1 python launch/doctor.py ..."
        )
    expected = nodes or (None if in_step else int(environment.get("SLURM_JOB_NUM_NODES") or 1))
    if expected is not None and expected != len(hosts):
        problems.append(
            f"{expected} nodes are expected, {len(hosts)} are examined; start the doctor on all of them: "
            "srun --ntasks-per-node=1 python launch/doctor.py ... (or --nodes 1 for this machine alone)"
        )
    if problems:
        raise UserError(problems)
    granted = _granted(environment)
    requested = gpus_per_node if gpus_per_node is not None else _requested(environment, granted)
    processes = int(environment.get("QVTUNE_PROCS_PER_NODE") or 0)
    return Allocation(
        node=node,
        hosts=hosts,
        job=f"{environment.get('SLURM_JOB_ID', 'none')}.{environment.get('SLURM_STEP_ID', os.getpid())}",
        port=_port(environment, alone=len(hosts) == 1),
        gpus_requested=requested,
        gpus_granted=granted,
        processes=processes or requested or 1,
        on_cpus=processes not in (0, requested),
    )


def _expand(node_list: str) -> tuple[str, ...]:
    """``n[1-2]`` -> ``n1``, ``n2``, expanded by Slurm."""
    command = ["scontrol", "show", "hostnames", node_list]
    return tuple(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def _granted(environment: Mapping[str, str]) -> int | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    return int(environment.get("SLURM_GPUS_ON_NODE") or 0)


def _requested(environment: Mapping[str, str], granted: int | None) -> int | None:
    """GPUs per node: ``--gpus-per-node`` of the job (``8``, ``h100:8``, ``a100:4,h100:4``), else those granted."""
    if request := environment.get("SLURM_GPUS_PER_NODE"):
        return sum(int(number) for number in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", request))
    return granted or None


def _port(environment: Mapping[str, str], alone: bool) -> int:
    """The port that the run will use, if it is known; else one that all nodes compute from the job id. 0: any."""
    if port := environment.get("QVTUNE_MASTER_PORT") or environment.get("MASTER_PORT"):
        return int(port)
    return 0 if alone else port_of_job(int(environment["SLURM_JOB_ID"]))
