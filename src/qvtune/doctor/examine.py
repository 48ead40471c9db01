"""The doctor: checks this machine, or all nodes of a job together, and says whether a run may start."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qvtune import versions
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.distributed.allocation import Allocation, find_allocation
from qvtune.doctor import devices, network, software, storage
from qvtune.doctor.collective import Workers
from qvtune.doctor.findings import Finding, Report
from qvtune.doctor.needs import Needs
from qvtune.doctor.recipe import check_recipe
from qvtune.doctor.stages import Stages

_CONNECT_SECONDS = 20.0


def doctor(run: RunConfig | None, nodes: int | None = None, gpus_per_node: int | None = None) -> None:
    """Run all checks and print one table on the first node, within 60 s.

    ``run``: check its settings, data, base and run folder too. ``nodes`` and ``gpus_per_node`` are the expected numbers
    where the job does not give them.

    Raises:
        NoGo: on the first node if a check has failed; on another node if its report did not reach the first one.
        UserError: for a step that does not have one process per node.
    """
    started = time.monotonic()
    if gpus_per_node is None and "SLURM_JOB_ID" not in os.environ:
        gpus_per_node = torch.cuda.device_count() or None
    allocation = find_allocation(nodes, gpus_per_node, os.environ)
    shared = None if run is None else storage.probe_folder(Path(run.run_dir), allocation.job)
    with Workers() as workers, ThreadPoolExecutor(1) as pool, network.listen() as listener:
        joining = pool.submit(network.join, allocation, started + _CONNECT_SECONDS)
        report = local_report(allocation, run, shared)
        link = joining.result()
        report = report.with_more(
            *link.findings,
            clock_offset=link.clock_offset,
            listener=listener.getsockname()[1],
            ranks=workers.number,
        )
        stages = Stages(allocation, shared, link, workers, started)
        (stages.run_on_master if allocation.node == 0 else stages.run_on_other_node)(report)


def local_report(allocation: Allocation, run: RunConfig | None, folder: Path | None) -> Report:
    """The checks that need no other node; probes of the run folder's file system are written to ``folder``."""
    findings = software.check_versions(versions.installed(), software.requirements())
    facts = software.version_facts() | software.code_fact()
    findings.append(_ranks(allocation))
    findings += devices.check_gpus(allocation, os.environ, torch.cuda.device_count())
    kernels, kernel_facts = devices.check_attention(ModelSection() if run is None else run.model)
    findings += kernels
    needs: Needs | None = None
    if run is not None:
        needs, run_findings, run_facts = check_recipe(allocation, run)
        reported = {finding.detail for finding in findings}
        findings += [finding for finding in run_findings if finding.detail not in reported]
        facts |= run_facts
    findings += devices.check_memory(allocation, needs, torch.cuda.is_available())
    figures: dict[str, Any] = {}
    if run is not None and folder is not None:
        checkpoint = 0 if needs is None else needs.checkpoint
        on_disk, offset = storage.check_storage(folder, allocation.node, checkpoint, run.checkpoint.keep)
        findings += on_disk
        figures = {"file_clock_offset": offset}
    return Report(allocation.node, allocation.host, tuple(findings), facts | kernel_facts, figures)


def _ranks(allocation: Allocation) -> Finding:
    first, last = allocation.node * allocation.processes, (allocation.node + 1) * allocation.processes - 1
    here = f"node {allocation.node} of {len(allocation.hosts)}: local ranks 0-{allocation.processes - 1}"
    return Finding("ranks", "ok", f"{here} are ranks {first}-{last} of {allocation.world_size}")
