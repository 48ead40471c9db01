"""The two stages of an examination of several nodes: reports of each node alone, then the tests between the nodes."""

import time
from contextlib import suppress
from pathlib import Path

from qvtune.console import console
from qvtune.distributed.allocation import Allocation
from qvtune.distributed.ports import any_free_port
from qvtune.doctor import compare, network, storage, table
from qvtune.doctor.collective import Workers
from qvtune.doctor.findings import Finding, Report, Verdict, verdicts
from qvtune.doctor.network import Link
from qvtune.doctor.rendezvous import Member, Membership, read_reports, write_report
from qvtune.errors import UserError

# Seconds after the start until which: reports of the first stage arrive; the collective runs; the table is printed.
_ARRIVAL, _COLLECTIVE, _END = 32.0, 50.0, 54.0


class NoGo(UserError):
    """The run must not start; the table says why."""

    exit_code = 1


class Stages:
    """One node's part in both stages. ``started``: time.monotonic() at the start of the doctor."""

    def __init__(
        self, allocation: Allocation, shared: Path | None, link: Link, workers: Workers, started: float
    ) -> None:
        self._allocation, self._shared, self._link, self._workers, self._started = (
            allocation,
            shared,
            link,
            workers,
            started,
        )

    def run_on_other_node(self, report: Report) -> None:
        """Send the report, take part in the tests, send their result. Returns when the master has both.

        Raises NoGo if the master cannot be told, neither by network nor through the shared folder.
        """
        try:
            membership = self._link.send_report(0, report, self._started + _ARRIVAL)
            if report.node in membership.nodes:
                report = self._test_between_nodes(report, membership)
                self._link.send_report(1, report, self._started + _END)
        except OSError as error:
            if self._link.client is not None:
                report = report.with_more(network.unreachable(f"the connection was lost: {error}"))
            self._send_through_folder(report)
        self._link.close()
        if self._shared is not None and 0 not in report.figures.get("sees", (0,)):
            storage.remove_probes(self._shared)  # a folder of this node alone: the master does not see it

    def _send_through_folder(self, report: Report) -> None:
        """Write the report to the shared folder, and wait until the master has read it and removed the folder."""
        with suppress(OSError):  # the folder is full or missing: the master reads nothing, and NoGo is raised below
            if self._shared is not None:
                write_report(self._shared, report)
                while time.monotonic() < self._started + _END + 2:
                    if not self._shared.exists():
                        return
                    time.sleep(0.2)
                storage.remove_probes(self._shared)
        failed = [f"{found.check}: {found.detail}" for found in report.findings if found.status == "fail"]
        raise NoGo(f"{self._allocation.host} could not tell {self._allocation.hosts[0]}: {'; '.join(failed)}")

    def run_on_master(self, report: Report) -> None:
        """Collect the reports of both stages, compare them, print the table. Raises NoGo if a check has failed."""
        first = self._collect(0, report, self._started + _ARRIVAL)
        waited = time.monotonic() - self._started
        server = self._link.server
        if server is not None:
            membership = server.close_stage(0)
        else:
            membership = Membership((Member(0, self._allocation.host, 0, report.figures["ranks"]),), any_free_port())
        report = self._test_between_nodes(report, membership)
        second = self._collect(1, report, self._started + _END, membership.nodes)
        if server is not None:
            server.close_stage(1)
        found = self._verdicts(first | second, waited)
        found += [
            (member.host, Finding(compare.REPORT, "fail", "no report of the second stage (tests between nodes)"))
            for member in membership.members
            if member.node not in second
        ]
        hosts = self._allocation.hosts
        table.show(found, hosts, time.monotonic() - self._started, console())
        if self._shared is not None:
            storage.remove_probes(self._shared)
        self._link.close()
        if any(finding.status == "fail" for _, finding in found):
            raise NoGo(table.verdict(found, hosts))

    def _verdicts(self, reports: dict[int, Report], waited: float) -> list[Verdict]:
        hosts = self._allocation.hosts
        found = verdicts(reports[node] for node in sorted(reports))
        return compare.attribute(found + compare.compare(reports, hosts, waited), hosts)

    def _test_between_nodes(self, report: Report, membership: Membership) -> Report:
        """The second stage: the other nodes' markers in the shared folder, connections to them, a collective."""
        if len(membership.members) > 1:
            if self._shared is not None:
                seen = storage.visible_markers(self._shared, report.node, membership.nodes, 3.0)
                report = report.with_more(sees=seen)
            report = report.with_more(unreachable=network.unreachable_members(membership.members, report.node))
        master = self._allocation.hosts[0] if len(self._allocation.hosts) > 1 else "127.0.0.1"
        deadline = self._started + _COLLECTIVE
        return report.with_more(*self._workers.try_collective(membership, master, report.node, deadline))

    def _collect(
        self, stage: int, own: Report, deadline: float, expected: tuple[int, ...] | None = None
    ) -> dict[int, Report]:
        """The reports of a stage, when those of all ``expected`` nodes have arrived or at the deadline.

        By network; in the first stage through the shared folder too.
        """
        wanted = set(range(len(self._allocation.hosts)) if expected is None else expected)
        server = self._link.server
        if server is not None:
            server.add_report(stage, own)
        while True:
            reports = {own.node: own} if server is None else server.reports(stage)
            if self._shared is not None and stage == 0:
                reports = read_reports(self._shared) | reports
            if wanted <= reports.keys() or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return reports
