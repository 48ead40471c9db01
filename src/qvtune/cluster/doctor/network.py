"""From this node: the master by name and port, the other nodes, and a collective among all."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from qvtune.cluster.doctor.findings import Finding, Report
from qvtune.cluster.doctor.meeting import Desk, Peer, Roll, Visit, visit
from qvtune.cluster.doctor.place import Place

REACH = "reach master"
_PEER_SECONDS = 4.0


@dataclass
class Link:
    """How this node takes part in the meeting: it holds the desk, or visits it, or neither (``findings`` says why)."""

    findings: list[Finding] = field(default_factory=list)
    clock_offset: float | None = None
    desk: Desk | None = None
    visit: Visit | None = None

    def hand_in(self, stage: int, report: Report, deadline: float) -> Roll | None:
        """Who has come; None when nobody can be asked, for a report is then left in the shared folder alone."""
        if self.visit is None:
            return None
        try:
            return self.visit.hand_in(stage, report, deadline)
        except OSError as error:
            self.findings.append(_unreachable(f"the connection to the master was lost: {error}"))
            self.visit = None
            return None


def join(place: Place, deadline: float) -> Link:
    """Open the desk on the master; on other nodes resolve its name, connect, and compare the clocks."""
    if len(place.hosts) == 1:
        return Link()
    return _hold_desk(place) if place.node == 0 else _visit_master(place, deadline)


def _hold_desk(place: Place) -> Link:
    desk = Desk(place.job, len(place.hosts))
    try:
        desk.open(place.port)
    except OSError as error:
        remedy = "set another MASTER_PORT, or exclude this node"
        detail = f"{place.host}:{place.port} cannot be listened on: {error.strerror}"
        return Link([Finding("master's port", "fail", detail, remedy)])
    return Link([Finding("master's port", "ok", f"{place.host}:{place.port}")], clock_offset=0.0, desk=desk)


def _visit_master(place: Place, deadline: float) -> Link:
    master = place.hosts[0]
    try:
        address = socket.getaddrinfo(master, place.port, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        remedy = "getent hosts NAME on this node; repair its DNS or /etc/hosts"
        return Link([Finding("resolve master", "fail", f"{master}: {error.strerror}", remedy)])
    found = Finding("resolve master", "ok", f"{master} is {address}")
    try:
        visitor = visit(master, place.port, place.job, deadline)
        offset = visitor.clock_offset()
    except OSError as error:
        return Link([found, _unreachable(f"{master} ({address}) port {place.port}: {error.strerror or error}")])
    reached = Finding(REACH, "ok", f"{master} ({address}) port {place.port} answers")
    return Link([found, reached], offset, visit=visitor)


def _unreachable(detail: str) -> Finding:
    return Finding(REACH, "fail", detail, "a firewall, a cable, or the wrong interface: ip route get ADDRESS")


def listen() -> socket.socket:
    """A port that other nodes can try; the kernel answers for it."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(1024)
    return listener


def unreachable_peers(peers: Sequence[Peer], node: int) -> list[int]:
    """The nodes that this one cannot connect to by name."""

    def obstacle(peer: Peer) -> int | None:
        try:
            socket.create_connection((peer.host, peer.listener), timeout=_PEER_SECONDS).close()
        except OSError:
            return peer.node
        return None

    others = [peer for peer in peers if peer.node != node]
    with ThreadPoolExecutor(max_workers=64) as pool:
        return [other for other in pool.map(obstacle, others) if other is not None]


def try_collective(roll: Roll, master: str, node: int, deadline: float) -> list[Finding]:
    """All-reduce and all-gather among all ranks that the nodes present would have, each in a process of its own."""
    ranks = min(peer.ranks for peer in roll.peers)  # differing numbers are reported elsewhere
    world_size = ranks * len(roll.peers)
    if world_size == 1:
        return []
    first = [peer.node for peer in roll.peers].index(node) * ranks
    seconds = max(1, int(deadline - time.monotonic()) - 2)  # its own message comes before it is ended
    processes = [_start([master, roll.port, first + local, world_size, local, seconds]) for local in range(ranks)]
    ends = [_end(process, deadline) for process in processes]
    problems = list(dict.fromkeys(problem for _, problem in ends if problem))
    if problems:
        remedy = "NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME must name the interface between the nodes"
        return [Finding("collective", "fail", problem, remedy) for problem in problems]
    if first:
        return [Finding("collective", "ok", "right values")]
    figures = json.loads(ends[0][0].splitlines()[-1])
    rates = f"all-reduce {figures['all_reduce'] / 1e9:.2f} GB/s, all-gather {figures['all_gather'] / 1e9:.2f} GB/s"
    return [Finding("collective", "ok", f"right values; {rates} ({world_size} ranks, {figures['backend']})")]


def _start(arguments: Sequence[object]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "qvtune.cluster.doctor.collective", *map(str, arguments)]
    # Variables of a launcher or of Slurm would make the process part of another group.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _end(process: "subprocess.Popen[str]", deadline: float) -> tuple[str, str]:
    """What a process has printed, and what was wrong with it; ended at the deadline."""
    try:
        output, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "", "all-reduce and all-gather had not ended in time"
    lines = errors.strip().splitlines()
    return output, "" if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")
