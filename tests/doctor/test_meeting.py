"""Reports over TCP and by files."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvtune.distributed.ports import any_free_port
from qvtune.doctor.findings import Finding, Report
from qvtune.doctor.meeting import Desk, Peer, leave_in, left_in, visit

JOB = "12.0"


def report(node: int) -> Report:
    return Report(node, f"n{node}", (Finding("disk", "ok", "much"),), {"torch": "2"}, {"listener": 5, "ranks": 8})


@pytest.fixture
def port() -> int:
    return any_free_port()


@pytest.fixture
def desk(port: int) -> Iterator[Desk]:
    """Of a job with three nodes."""
    desk = Desk(JOB, num_nodes=3)
    desk.open(port)
    yield desk
    desk.close()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def test_all_wait_for_all_and_get_one_roll(desk: Desk, port: int) -> None:
    def come(node: int) -> object:
        visitor = visit("127.0.0.1", port, JOB, soon())
        roll = visitor.hand_in(0, report(node), soon())
        visitor.close()
        return roll

    with ThreadPoolExecutor(2) as pool:
        rolls = [pool.submit(come, node) for node in (2, 1)]
        desk.hand_in(0, report(0))
        own = desk.roll(0, soon())
    assert own.peers == tuple(Peer(node, f"n{node}", 5, 8) for node in range(3))
    assert [future.result() for future in rolls] == [own, own]
    assert desk.reports(0) == {node: report(node) for node in range(3)}


def test_who_comes_late_is_not_on_the_roll_and_sees_so(desk: Desk, port: int) -> None:
    """Otherwise it would take part in a collective of which the others do not know it."""
    desk.hand_in(0, report(0))
    assert desk.roll(0, time.monotonic() + 0.1) == desk.end(0)
    visitor = visit("127.0.0.1", port, JOB, soon())
    assert [peer.node for peer in visitor.hand_in(0, report(1), soon()).peers] == [0]
    visitor.close()


def test_clocks_are_compared(desk: Desk, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = visit("127.0.0.1", port, JOB, soon())
    right, here = time.time, threading.current_thread()
    monkeypatch.setattr(time, "time", lambda: right() + (300 if threading.current_thread() is here else 0))
    assert visitor.clock_offset() == pytest.approx(300, abs=1)
    visitor.close()


def test_another_jobs_doctor_is_not_taken_for_the_master(desk: Desk, port: int) -> None:
    visitor = visit("127.0.0.1", port, "13.0", soon())
    with pytest.raises(ConnectionError, match=r"another program .* job 12\.0"):
        visitor.clock_offset()
    visitor.close()


def test_nobody_listens(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        visit("127.0.0.1", port, JOB, soon(0.1))


def test_a_port_that_is_taken(desk: Desk, port: int) -> None:
    with pytest.raises(OSError, match="in use"):
        Desk(JOB, 3).open(port)


def test_reports_by_files(tmp_path: Path) -> None:
    leave_in(tmp_path, report(2))
    leave_in(tmp_path, report(1).with_more(Finding("port", "fail", "closed")))
    assert left_in(tmp_path) == {2: report(2), 1: report(1).with_more(Finding("port", "fail", "closed"))}
