"""Exchange of reports over TCP and by files."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvtune.distributed.ports import any_free_port
from qvtune.doctor.findings import Finding, Report
from qvtune.doctor.rendezvous import Member, Server, connect, read_reports, write_report

JOB = "12.0"


def report(node: int) -> Report:
    return Report(node, f"n{node}", (Finding("disk", "ok", "much"),), {"torch": "2"}, {"listener": 5, "ranks": 8})


@pytest.fixture
def port() -> int:
    return any_free_port()


@pytest.fixture
def server(port: int) -> Iterator[Server]:
    """For a job of three nodes."""
    server = Server(JOB, num_nodes=3)
    server.start(port)
    yield server
    server.close()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def test_all_wait_for_all_and_get_one_membership(server: Server, port: int) -> None:
    def report_of(node: int) -> object:
        client = connect("127.0.0.1", port, JOB, soon())
        membership = client.send_report(0, report(node), soon())
        client.close()
        return membership

    with ThreadPoolExecutor(2) as pool:
        memberships = [pool.submit(report_of, node) for node in (2, 1)]
        server.add_report(0, report(0))
        own = server.wait_for_members(0, soon())
    assert own.members == tuple(Member(node, f"n{node}", 5, 8) for node in range(3))
    assert [future.result() for future in memberships] == [own, own]
    assert server.reports(0) == {node: report(node) for node in range(3)}


def test_a_late_node_is_no_member_and_learns_so(server: Server, port: int) -> None:
    """Otherwise it would take part in a collective in which the others do not expect it."""
    server.add_report(0, report(0))
    assert server.wait_for_members(0, time.monotonic() + 0.1) == server.close_stage(0)
    client = connect("127.0.0.1", port, JOB, soon())
    assert [member.node for member in client.send_report(0, report(1), soon()).members] == [0]
    client.close()


def test_clocks_are_compared(server: Server, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect("127.0.0.1", port, JOB, soon())
    right, here = time.time, threading.current_thread()
    monkeypatch.setattr(time, "time", lambda: right() + (300 if threading.current_thread() is here else 0))
    assert client.clock_offset() == pytest.approx(300, abs=1)
    client.close()


def test_another_jobs_doctor_is_not_taken_for_the_master(server: Server, port: int) -> None:
    client = connect("127.0.0.1", port, "13.0", soon())
    with pytest.raises(ConnectionError, match=r"another program .* job 12\.0"):
        client.clock_offset()
    client.close()


def test_nobody_listens(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", port, JOB, soon(0.1))


def test_a_port_that_is_taken(server: Server, port: int) -> None:
    with pytest.raises(OSError, match="in use"):
        Server(JOB, 3).start(port)


def test_reports_by_files(tmp_path: Path) -> None:
    write_report(tmp_path, report(2))
    write_report(tmp_path, report(1).with_more(Finding("port", "fail", "closed")))
    assert read_reports(tmp_path) == {2: report(2), 1: report(1).with_more(Finding("port", "fail", "closed"))}
