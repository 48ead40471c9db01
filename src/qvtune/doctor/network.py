"""From this node: the master by name and port, and the other nodes."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qvtune.distributed.place import Place
from qvtune.doctor.findings import Finding, Report
from qvtune.doctor.meeting import Desk, Peer, Roll, Visit, visit

REACH = "reach master"
_PEER_SECONDS = 4.0


@dataclass
class Link:
    """How this node takes part in the meeting: it holds the desk, or visits it, or neither (``findings`` says why)."""

    findings: tuple[Finding, ...] = ()
    clock_offset: float | None = None
    desk: Desk | None = None
    visit: Visit | None = None

    def hand_in(self, stage: int, report: Report, deadline: float) -> Roll:
        """As ``Visit.hand_in``; ConnectionError also where the master was never reached."""
        if self.visit is None:
            raise ConnectionError("never reached")
        return self.visit.hand_in(stage, report, deadline)

    def close(self) -> None:
        """Leave the meeting."""
        if self.visit is not None:
            self.visit.close()
        if self.desk is not None:
            self.desk.close()


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
        return Link((Finding("master's port", "fail", detail, remedy),))
    return Link((Finding("master's port", "ok", f"{place.host}:{place.port}"),), clock_offset=0.0, desk=desk)


def _visit_master(place: Place, deadline: float) -> Link:
    master = place.hosts[0]
    try:
        address = socket.getaddrinfo(master, place.port, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        remedy = "getent hosts NAME on this node; repair its DNS or /etc/hosts"
        return Link((Finding("resolve master", "fail", f"{master}: {error.strerror}", remedy),))
    found = Finding("resolve master", "ok", f"{master} is {address}")
    try:
        visitor = visit(master, place.port, place.job, deadline)
        offset = visitor.clock_offset()
    except OSError as error:
        return Link((found, unreachable(f"{master} ({address}) port {place.port}: {error.strerror or error}")))
    reached = Finding(REACH, "ok", f"{master} ({address}) port {place.port} answers")
    return Link((found, reached), offset, visit=visitor)


def unreachable(detail: str) -> Finding:
    """The master cannot be talked to."""
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
