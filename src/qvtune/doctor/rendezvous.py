"""Exchange of reports between the nodes: with the master over TCP, or by files in the shared folder.

JSON lines over plain sockets, with a deadline on every call: the doctor must end even where a collective would hang.
The examination has two stages. In each, every node sends its report and gets the list of the nodes that have done so.
"""

import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvtune.distributed.ports import any_free_port
from qvtune.doctor.findings import Report
from qvtune.storage.atomic import atomic_file

_MAX_LINE_BYTES = 1 << 20
_CLOCK_ROUNDS = 5
_LAST_ANSWERS_SECONDS = 2.0


@dataclass(frozen=True)
class Member:
    """A node that takes part: the port on which it listens, and the number of ranks that would run on it."""

    node: int
    host: str
    listener: int
    ranks: int


@dataclass(frozen=True)
class Membership:
    """The nodes that take part; ``port`` of the master is free for their collectives."""

    members: tuple[Member, ...]
    port: int

    @property
    def nodes(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(member.node for member in self.members)


class Server:
    """Runs on the master: collects the reports of each stage and answers with the membership."""

    def __init__(self, job: str, num_nodes: int) -> None:
        self._job, self._num_nodes = job, num_nodes
        self._changed = threading.Condition()
        self._reports: dict[int, dict[int, Report]] = {}  # stage -> node -> report
        self._memberships: dict[int, Membership] = {}
        self._tcp_server: socketserver.ThreadingTCPServer | None = None
        self._free_port = 0
        self._num_connections = 0

    def start(self, port: int) -> None:
        """Listen on all interfaces. Raises OSError if the port cannot be used."""
        server = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                # A node that disconnects is missing in the table, which says so. Port scanners connect as well.
                with server._connection(), suppress(OSError, ValueError):
                    for line in iter(lambda: self.rfile.readline(_MAX_LINE_BYTES), b""):
                        self.wfile.write(json.dumps(server._answer(json.loads(line))).encode() + b"\n")

        class TCPServer(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 1024

        self._tcp_server = TCPServer(("", port), Handler)
        threading.Thread(target=self._tcp_server.serve_forever, daemon=True).start()
        self._free_port = any_free_port()

    def close(self) -> None:
        """Stop listening, once the clients have read their last answers or have failed to for two seconds."""
        assert self._tcp_server is not None
        with self._changed:
            self._changed.wait_for(lambda: self._num_connections == 0, timeout=_LAST_ANSWERS_SECONDS)
        self._tcp_server.shutdown()
        self._tcp_server.server_close()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        self._count(1)
        yield
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._num_connections += change
            self._changed.notify_all()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("job") != self._job:
            return {"refused": f"the doctor of job {self._job}"}
        if "report" not in request:
            return {"time": time.time()}
        self.add_report(request["stage"], Report.from_json(request["report"]))
        return asdict(self.wait_for_members(request["stage"], time.monotonic() + request["seconds"]))

    def add_report(self, stage: int, report: Report) -> None:
        """Store a node's report of a stage."""
        with self._changed:
            self._reports.setdefault(stage, {})[report.node] = report
            self._changed.notify_all()

    def reports(self, stage: int) -> dict[int, Report]:
        """The reports of a stage so far, by node."""
        with self._changed:
            return dict(self._reports.get(stage, {}))

    def close_stage(self, stage: int) -> Membership:
        """Wait for no more nodes in this stage. Returns the membership that all nodes get from now on."""
        return self.wait_for_members(stage, deadline=0.0)

    def wait_for_members(self, stage: int, deadline: float) -> Membership:
        """The nodes whose report has arrived, when all have or at the deadline; the same answer for every caller."""
        with self._changed:
            reports = self._reports.setdefault(stage, {})
            self._changed.wait_for(
                lambda: stage in self._memberships or len(reports) >= self._num_nodes,
                timeout=deadline - time.monotonic(),
            )
            if stage not in self._memberships:
                figures = [(node, report.host, report.figures) for node, report in sorted(reports.items())]
                members = tuple(Member(node, host, known["listener"], known["ranks"]) for node, host, known in figures)
                self._memberships[stage] = Membership(members, self._free_port)
                self._changed.notify_all()
            return self._memberships[stage]


class Client:
    """Runs on every other node: a connection to the master's server."""

    def __init__(self, connection: socket.socket, job: str) -> None:
        self._connection, self._job = connection, job
        self._lines = connection.makefile("rb")

    def clock_offset(self) -> float:
        """Seconds that this node's clock is ahead of the master's, measured by the fastest of some round trips."""
        trips = []
        for _ in range(_CLOCK_ROUNDS):
            sent, started = time.time(), time.monotonic()
            master_time = self._request({}, seconds=5)["time"]
            took = time.monotonic() - started
            trips.append((took, sent + took / 2 - master_time))
        return float(min(trips)[1])

    def send_report(self, stage: int, report: Report, deadline: float) -> Membership:
        """Send a report and wait as ``Server.wait_for_members``. Raises OSError if the master does not answer."""
        seconds = deadline - time.monotonic()
        answer = self._request({"report": report.as_json(), "stage": stage, "seconds": seconds}, seconds + 2)
        return Membership(tuple(Member(**member) for member in answer["members"]), answer["port"])

    def close(self) -> None:
        """Disconnect."""
        self._lines.close()
        self._connection.close()

    def _request(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        self._connection.settimeout(max(0.1, seconds))
        self._connection.sendall(json.dumps({"job": self._job, **request}).encode() + b"\n")
        line = self._lines.readline(_MAX_LINE_BYTES)
        if not line:
            raise ConnectionError("the master has closed the connection")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ConnectionError(f"another program answers at that port: {answer['refused']}")
        return answer


def connect(host: str, port: int, job: str, deadline: float) -> Client:
    """Connect to the master, which may not have started yet. Raises OSError with the last error at the deadline."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
            return Client(connection, job)
        except OSError:
            if time.monotonic() + 0.5 > deadline:
                raise
            time.sleep(0.5)


def write_report(folder: Path, report: Report) -> None:
    """Write the report as a file, for a master that cannot be reached by network."""
    with atomic_file(folder / f"report-{report.node}.json") as private:
        private.write_text(json.dumps(report.as_json()), encoding="utf-8")


def read_reports(folder: Path) -> dict[int, Report]:
    """The reports that ``write_report`` has left in the folder, by node."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("report-*.json")]
    return {content["node"]: Report.from_json(content) for content in contents}
