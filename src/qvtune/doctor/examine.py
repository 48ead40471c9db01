"""The doctor: looks at this machine, or together with its like at all nodes of a job, and says go or no-go."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qvtune import versions
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.console import console
from qvtune.distributed.place import Place, find_place
from qvtune.distributed.ports import any_free_port
from qvtune.doctor import compare, devices, network, software, storage, table
from qvtune.doctor.collective import Ranks
from qvtune.doctor.findings import Finding, Report, Verdict, verdicts
from qvtune.doctor.meeting import Peer, Roll, leave_in, left_in
from qvtune.doctor.needs import Needs, needs_of, open_folder
from qvtune.doctor.network import Link
from qvtune.errors import UserError
from qvtune.model.attention import choose_dtype
from qvtune.storage.safetensors import TensorFiles

# Seconds after the start: a node that has not come by then is missing; the collective is ended; the table is printed.
_ARRIVAL, _COLLECTIVE, _END = 32.0, 50.0, 54.0
_CONNECT = 20.0


def doctor(run: RunConfig | None, nodes: int | None = None, gpus_per_node: int | None = None) -> None:
    """Examine, and print one table on the first node, within 60 s; the other nodes leave when they have been heard.

    ``run``: check its data, base and run folder, too. ``nodes`` and ``gpus_per_node`` are what is expected where the
    job does not say.

    Raises NoGo on the first node when a check has failed, elsewhere when the first node could not be told; UserError
    for a step that has not one process a node.
    """
    started = time.monotonic()
    place = find_place(nodes, gpus_per_node, os.environ)
    shared = None if run is None else storage.probe_folder(Path(run.run_dir), place.job)
    with Ranks.running() as ranks, ThreadPoolExecutor(1) as pool, network.listen() as listener:
        joining = pool.submit(network.join, place, started + _CONNECT)
        report = local_report(place, run, shared)
        link = joining.result()
        report = report.with_more(
            *link.findings,
            clock_offset=link.clock_offset,
            listener=listener.getsockname()[1],
            ranks=ranks.number,
        )
        examination = _Examination(place, shared, link, ranks, started)
        (examination.lead if place.node == 0 else examination.follow)(report)


class NoGo(UserError):
    """Do not start the run: the table says why."""

    exit_code = 1


def local_report(place: Place, run: RunConfig | None, folder: Path | None) -> Report:
    """What this node finds out alone; ``folder`` is for probes of the run folder's file system."""
    findings = software.check_versions(versions.installed(), software.requirements())
    facts = software.version_facts() | software.code_fact()
    findings.append(_rank_map(place))
    findings += devices.check_gpus(place, os.environ, torch.cuda.device_count())
    section = ModelSection() if run is None else run.model
    kernels, kernel_facts = devices.check_attention(section)
    needs, base_findings, run_facts = _run_facts(place, run)
    findings += [*kernels, *base_findings]
    findings += devices.check_memory(place, needs, torch.cuda.is_available())
    figures: dict[str, Any] = {}
    if run is not None and folder is not None:
        checkpoint = 0 if needs is None else needs.checkpoint
        on_disk, offset = storage.check_storage(folder, place.node, checkpoint, run.checkpoint.keep)
        findings += on_disk
        figures = {"file_clock_offset": offset}
    return Report(place.node, place.host, tuple(findings), facts | kernel_facts | run_facts, figures)


def _rank_map(place: Place) -> Finding:
    first, last = place.node * place.processes, (place.node + 1) * place.processes - 1
    here = f"node {place.node} of {len(place.hosts)}: local ranks 0-{place.processes - 1}"
    return Finding("ranks", "ok", f"{here} are ranks {first}-{last} of {place.world_size}")


def _run_facts(place: Place, run: RunConfig | None) -> tuple[Needs | None, list[Finding], dict[str, str]]:
    """What a recipe adds: its data and its base, as this node sees them."""
    if run is None:
        return None, [], {}
    facts, findings = software.data_facts(run)
    try:
        weights: TensorFiles | None = open_folder(run)
        if weights is None:
            name = run.model.name_or_path
            findings.append(Finding("base", "ok", f"{name}: in a cache of each node, not looked at"))
            return None, findings, facts
        needs = needs_of(run, weights, place.world_size, choose_dtype(run.model.dtype)[0])
    except UserError as error:
        remedy = "put it on a file system that all nodes have (model.name_or_path)"
        findings += [Finding("base", "fail", problem, remedy) for problem in error.problems]
        return None, findings, facts | {"base": "not readable"}
    total = sum(tensor.num_bytes for tensor in weights.values())
    findings.append(Finding("base", "ok", f"{weights.folder}: {len(weights)} tensors, {total / 1e9:.2f} GB"))
    return needs, findings, facts | software.base_fact(weights)


class _Examination:
    """One node's way through the two stages of the meeting."""

    def __init__(self, place: Place, shared: Path | None, link: Link, ranks: Ranks, started: float) -> None:
        self._place, self._shared, self._link, self._ranks, self._started = place, shared, link, ranks, started

    def follow(self, report: Report) -> None:
        """A node other than the master: hands in, takes part, and stays until it has been heard."""
        try:
            roll = self._link.hand_in(0, report, self._started + _ARRIVAL)
            if report.node in {peer.node for peer in roll.peers}:
                report = self._second_stage(report, roll)
                self._link.hand_in(1, report, self._started + _END)
        except OSError as error:
            if self._link.visit is not None:
                report = report.with_more(network.unreachable(f"the connection was lost: {error}"))
            self._leave_in_folder(report)
        self._link.close()
        if self._shared is not None and 0 not in report.figures.get("sees", (0,)):
            storage.remove_probes(self._shared)  # nobody else's

    def _leave_in_folder(self, report: Report) -> None:
        """The second way: wait until the master has read the report, and with it removed the shared folder."""
        with suppress(OSError):  # a folder that is full or missing: then nobody reads, and that is raised below
            if self._shared is not None:
                leave_in(self._shared, report)
                while time.monotonic() < self._started + _END + 2:
                    if not self._shared.exists():
                        return
                    time.sleep(0.2)
                storage.remove_probes(self._shared)
        failed = [f"{found.check}: {found.detail}" for found in report.findings if found.status == "fail"]
        raise NoGo(f"{self._place.host} could not tell {self._place.hosts[0]}: {'; '.join(failed)}")

    def lead(self, report: Report) -> None:
        """The master: collects, compares, prints."""
        first = self._collect(0, report, self._started + _ARRIVAL)
        waited = time.monotonic() - self._started
        desk = self._link.desk
        if desk is not None:
            roll = desk.end(0)
        else:
            roll = Roll((Peer(0, self._place.host, 0, report.figures["ranks"]),), any_free_port())
        report = self._second_stage(report, roll)
        second = self._collect(1, report, self._started + _END, tuple(peer.node for peer in roll.peers))
        if desk is not None:
            desk.end(1)
        reports = first | second
        hosts = self._place.hosts
        found: list[Verdict] = verdicts(reports[node] for node in sorted(reports))
        found = compare.blame(found + compare.compare(reports, hosts, waited), hosts)
        found += [
            (peer.host, Finding("answer", "fail", "went silent in the second stage (network tests)"))
            for peer in roll.peers
            if peer.node not in second
        ]
        table.show(found, hosts, time.monotonic() - self._started, console())
        if self._shared is not None:
            storage.remove_probes(self._shared)
        self._link.close()
        if any(finding.status == "fail" for _, finding in found):
            raise NoGo(table.verdict(found, hosts))

    def _second_stage(self, report: Report, roll: Roll) -> Report:
        """What needs the others: their markers, their ports, a collective."""
        present = [peer.node for peer in roll.peers]
        if len(present) > 1:
            if self._shared is not None:
                report = report.with_more(sees=storage.visible_markers(self._shared, report.node, present, 3.0))
            report = report.with_more(unreachable=network.unreachable_peers(roll.peers, report.node))
        master = self._place.hosts[0] if len(self._place.hosts) > 1 else "127.0.0.1"
        deadline = self._started + _COLLECTIVE
        return report.with_more(*self._ranks.try_collective(roll, master, report.node, deadline))

    def _collect(
        self, stage: int, own: Report, deadline: float, expected: tuple[int, ...] | None = None
    ) -> dict[int, Report]:
        """The reports of a stage, by network, else from the shared folder: all ``expected``, or what came in time."""
        wanted = set(range(len(self._place.hosts)) if expected is None else expected)
        desk = self._link.desk
        if desk is not None:
            desk.hand_in(stage, own)
        while True:
            reports = {own.node: own} if desk is None else desk.reports(stage)
            if self._shared is not None and stage == 0:
                reports = left_in(self._shared) | reports
            if wanted <= reports.keys() or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return reports
