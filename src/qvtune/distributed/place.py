"""Which node this is among which, and what was asked for: from Slurm's variables, else this machine alone."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from qvtune.distributed.ports import port_of_job
from qvtune.errors import UserError


@dataclass(frozen=True)
class Place:
    """This node's index in ``hosts``, the first of which is the master.

    ``port`` is the master's for this job. ``gpus_asked`` and ``gpus_granted`` are a node's, None where nobody said;
    ``processes`` is the number of ranks a node.
    """

    node: int
    hosts: tuple[str, ...]
    job: str
    port: int
    gpus_asked: int | None
    gpus_granted: int | None
    processes: int
    on_cpus: bool

    @property
    def host(self) -> str:
        """This node's name."""
        return self.hosts[self.node]

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return len(self.hosts) * self.processes


def find_place(nodes: int | None, gpus_per_node: int | None, environment: Mapping[str, str]) -> Place:
    """This process's place; ``nodes`` and ``gpus_per_node`` are what the person expects, None = what the job has.

    ``QVTUNE_PROCS_PER_NODE`` ranks that are not one for each GPU are meant to run on CPUs (slurm/cluster.env).

    Raises UserError when a step of several nodes has not one process a node, or fewer nodes than expected.
    """
    in_step = "SLURM_STEP_NODELIST" in environment
    hosts = _expand(environment["SLURM_STEP_NODELIST"]) if in_step else (socket.gethostname(),)
    node = int(environment["SLURM_PROCID"]) if in_step else 0
    problems = []
    if in_step and int(environment["SLURM_NTASKS"]) != len(hosts):
        problems.append(
            f"{environment['SLURM_NTASKS']} processes on {len(hosts)} nodes; start one a node: "
            "srun --ntasks-per-node=1 python launch/doctor.py ..."
        )
    expected = nodes or (None if in_step else int(environment.get("SLURM_JOB_NUM_NODES") or 1))
    if expected is not None and expected != len(hosts):
        problems.append(
            f"{expected} nodes are expected, {len(hosts)} are looked at; start it on all of them: "
            "srun --ntasks-per-node=1 python launch/doctor.py ... (or --nodes 1 for this machine alone)"
        )
    if problems:
        raise UserError(problems)
    granted = _granted(environment)
    asked = gpus_per_node if gpus_per_node is not None else _asked(environment, granted)
    processes = int(environment.get("QVTUNE_PROCS_PER_NODE") or 0)
    return Place(
        node=node,
        hosts=hosts,
        job=f"{environment.get('SLURM_JOB_ID', 'none')}.{environment.get('SLURM_STEP_ID', os.getpid())}",
        port=_port(environment, alone=len(hosts) == 1),
        gpus_asked=asked,
        gpus_granted=granted,
        processes=processes or asked or 1,
        on_cpus=processes not in (0, asked),
    )


def _expand(node_list: str) -> tuple[str, ...]:
    """``n[1-2]`` -> ``n1``, ``n2``, by Slurm itself."""
    command = ["scontrol", "show", "hostnames", node_list]
    return tuple(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def _granted(environment: Mapping[str, str]) -> int | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    return int(environment.get("SLURM_GPUS_ON_NODE") or 0)


def _asked(environment: Mapping[str, str], granted: int | None) -> int | None:
    """``--gpus-per-node`` of the job (``8``, ``h100:8``, also ``a100:4,h100:4``), else what Slurm has granted."""
    if request := environment.get("SLURM_GPUS_PER_NODE"):
        return sum(int(number) for number in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", request))
    return granted or None


def _port(environment: Mapping[str, str], alone: bool) -> int:
    """The one that the run will use where it is known already; else one that all nodes compute alike. 0 = any."""
    if port := environment.get("QVTUNE_MASTER_PORT") or environment.get("MASTER_PORT"):
        return int(port)
    return 0 if alone else port_of_job(int(environment["SLURM_JOB_ID"]))
