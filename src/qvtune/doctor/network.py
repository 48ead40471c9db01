"""Network checks of this node: resolve and reach the master, reach the other nodes."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qvtune.distributed.allocation import Allocation
from qvtune.doctor.findings import Finding, Report
from qvtune.doctor.rendezvous import Client, Member, Membership, Server, connect

REACH = "reach master"
_CONNECT_SECONDS = 4.0


@dataclass
class Link:
    """This node's end of the exchange: the server, a client, or neither, in which case ``findings`` say why."""

    findings: tuple[Finding, ...] = ()
    clock_offset: float | None = None
    server: Server | None = None
    client: Client | None = None

    def send_report(self, stage: int, report: Report, deadline: float) -> Membership:
        """As ``Client.send_report``; raises ConnectionError too if the master was never reached."""
        if self.client is None:
            raise ConnectionError("never reached")
        return self.client.send_report(stage, report, deadline)

    def close(self) -> None:
        """Disconnect, or stop the server."""
        if self.client is not None:
            self.client.close()
        if self.server is not None:
            self.server.close()


def join(allocation: Allocation, deadline: float) -> Link:
    """On the master start the server; on other nodes resolve its name, connect, and compare the clocks."""
    if len(allocation.hosts) == 1:
        return Link()
    return _start_server(allocation) if allocation.node == 0 else _connect_to_master(allocation, deadline)


def _start_server(allocation: Allocation) -> Link:
    server = Server(allocation.job, len(allocation.hosts))
    try:
        server.start(allocation.port)
    except OSError as error:
        remedy = "set another MASTER_PORT, or exclude this node"
        detail = f"{allocation.host}:{allocation.port} cannot be listened on: {error.strerror}"
        return Link((Finding("master's port", "fail", detail, remedy),))
    return Link(
        (Finding("master's port", "ok", f"{allocation.host}:{allocation.port}"),), clock_offset=0.0, server=server
    )


def _connect_to_master(allocation: Allocation, deadline: float) -> Link:
    master = allocation.hosts[0]
    try:
        address = socket.getaddrinfo(master, allocation.port, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        remedy = "getent hosts NAME on this node; repair its DNS or /etc/hosts"
        return Link((Finding("resolve master", "fail", f"{master}: {error.strerror}", remedy),))
    found = Finding("resolve master", "ok", f"{master} is {address}")
    try:
        client = connect(master, allocation.port, allocation.job, deadline)
        offset = client.clock_offset()
    except OSError as error:
        return Link((found, unreachable(f"{master} ({address}) port {allocation.port}: {error.strerror or error}")))
    reached = Finding(REACH, "ok", f"{master} ({address}) port {allocation.port} answers")
    return Link((found, reached), offset, client=client)


def unreachable(detail: str) -> Finding:
    """The master cannot be reached, or no longer."""
    return Finding(REACH, "fail", detail, "a firewall, a cable, or the wrong interface: ip route get ADDRESS")


def listen() -> socket.socket:
    """A listening port for the other nodes' test connections; the kernel accepts them."""
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(1024)
    return listener


def unreachable_members(members: Sequence[Member], node: int) -> list[int]:
    """The other nodes to which this one cannot connect by name."""

    def failed(member: Member) -> int | None:
        try:
            socket.create_connection((member.host, member.listener), timeout=_CONNECT_SECONDS).close()
        except OSError:
            return member.node
        return None

    others = [member for member in members if member.node != node]
    with ThreadPoolExecutor(max_workers=64) as pool:
        return [other for other in pool.map(failed, others) if other is not None]
