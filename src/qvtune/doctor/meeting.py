"""Where the nodes' reports come together: on the master over TCP, and in the shared folder for those it cannot reach.

JSON lines over plain sockets with deadlines everywhere: the doctor must end also where a collective would hang.
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

_LONGEST_LINE = 1 << 20  # bytes
_CLOCK_ROUNDS = 5
_LAST_ANSWERS_SECONDS = 2.0


@dataclass(frozen=True)
class Peer:
    """What the nodes that have come know of each other: a listening port, and how many ranks would run there."""

    node: int
    host: str
    listener: int
    ranks: int


@dataclass(frozen=True)
class Roll:
    """Who has come; ``port`` of the master is free for their collectives."""

    peers: tuple[Peer, ...]
    port: int


class Desk:
    """The master's side: collects a report of each stage from each node, and answers who has come."""

    def __init__(self, job: str, num_nodes: int) -> None:
        self._job, self._num_nodes = job, num_nodes
        self._changed = threading.Condition()
        self._stages: dict[int, dict[int, Report]] = {}
        self._rolls: dict[int, Roll] = {}
        self._server: socketserver.ThreadingTCPServer | None = None
        self._free_port = 0
        self._visitors = 0

    def open(self, port: int) -> None:
        """Listen on all interfaces. Raises OSError when the port cannot be had."""
        desk = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                # A node that has gone is missing from the table, which says so; others may scan ports.
                with desk._counted(), suppress(OSError, ValueError):
                    for line in iter(lambda: self.rfile.readline(_LONGEST_LINE), b""):
                        self.wfile.write(json.dumps(desk._answer(json.loads(line))).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 1024

        self._server = Server(("", port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._free_port = any_free_port()

    def close(self) -> None:
        """Stop listening, when the visitors have had their answers, or are not taking them."""
        assert self._server is not None
        with self._changed:
            self._changed.wait_for(lambda: self._visitors == 0, timeout=_LAST_ANSWERS_SECONDS)
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._count(1)
        yield
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._visitors += change
            self._changed.notify_all()

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if question.get("job") != self._job:
            return {"refused": f"the doctor of job {self._job}"}
        if "report" not in question:
            return {"time": time.time()}
        self.hand_in(question["stage"], Report.from_json(question["report"]))
        return asdict(self.roll(question["stage"], time.monotonic() + question["seconds"]))

    def hand_in(self, stage: int, report: Report) -> None:
        """Note a report."""
        with self._changed:
            self._stages.setdefault(stage, {})[report.node] = report
            self._changed.notify_all()

    def reports(self, stage: int) -> dict[int, Report]:
        """What has been handed in, by node."""
        with self._changed:
            return dict(self._stages.get(stage, {}))

    def end(self, stage: int) -> Roll:
        """Wait for no more nodes in this stage; the roll that all get from now on."""
        return self.roll(stage, deadline=0.0)

    def roll(self, stage: int, deadline: float) -> Roll:
        """Who has handed in, as soon as that is everybody, or by the deadline; one and the same roll for all."""
        with self._changed:
            reports = self._stages.setdefault(stage, {})
            self._changed.wait_for(
                lambda: stage in self._rolls or len(reports) >= self._num_nodes, timeout=deadline - time.monotonic()
            )
            if stage not in self._rolls:
                figures = [(node, report.host, report.figures) for node, report in sorted(reports.items())]
                peers = tuple(Peer(node, host, known["listener"], known["ranks"]) for node, host, known in figures)
                self._rolls[stage] = Roll(peers, self._free_port)
                self._changed.notify_all()
            return self._rolls[stage]


class Visit:
    """Another node's side: a connection to the master's desk."""

    def __init__(self, connection: socket.socket, job: str) -> None:
        self._connection, self._job = connection, job
        self._lines = connection.makefile("rb")

    def clock_offset(self) -> float:
        """Seconds that this node's clock is ahead of the master's, from the quickest of some round trips."""
        trips = []
        for _ in range(_CLOCK_ROUNDS):
            sent, started = time.time(), time.monotonic()
            there = self._ask({}, seconds=5)["time"]
            took = time.monotonic() - started
            trips.append((took, sent + took / 2 - there))
        return float(min(trips)[1])

    def hand_in(self, stage: int, report: Report, deadline: float) -> Roll:
        """Hand a report in and wait as ``Desk.roll`` does. Raises OSError when the master does not answer."""
        seconds = deadline - time.monotonic()
        answer = self._ask({"report": report.as_json(), "stage": stage, "seconds": seconds}, seconds + 2)
        return Roll(tuple(Peer(**peer) for peer in answer["peers"]), answer["port"])

    def close(self) -> None:
        """Leave."""
        self._lines.close()
        self._connection.close()

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        self._connection.settimeout(max(0.1, seconds))
        self._connection.sendall(json.dumps({"job": self._job, **question}).encode() + b"\n")
        line = self._lines.readline(_LONGEST_LINE)
        if not line:
            raise ConnectionError("the master has closed the connection")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ConnectionError(f"another program answers at that port: {answer['refused']}")
        return answer


def visit(host: str, port: int, job: str, deadline: float) -> Visit:
    """Connect to the master, which may not have started yet. Raises OSError with the last reason at the deadline."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
            return Visit(connection, job)
        except OSError:
            if time.monotonic() + 0.5 > deadline:
                raise
            time.sleep(0.5)


def leave_in(folder: Path, report: Report) -> None:
    """The report as a file, for a master that cannot be reached otherwise; appears whole."""
    with atomic_file(folder / f"report-{report.node}.json") as private:
        private.write_text(json.dumps(report.as_json()), encoding="utf-8")


def left_in(folder: Path) -> dict[int, Report]:
    """The reports in the shared folder, by node."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("report-*.json")]
    return {content["node"]: Report.from_json(content) for content in contents}
