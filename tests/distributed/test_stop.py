"""One request may arrive as several signals; a second request ends the process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qvtune.distributed import process_group, stop, stop_signals
from qvtune.distributed.stop import StopRequest
from qvtune.distributed.stop_signals import (
    REPEAT_SECONDS,
    SIGNALS,
    STOP_FILE,
    end_at_second_request,
    record_stop_signals,
)
from qvtune.errors import StopRequested


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    return codes


def wait_for(request: StopRequest) -> None:
    """The listening thread needs a moment."""
    deadline = time.monotonic() + 10
    while request.signal is None and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_next_poll(number: signal.Signals) -> None:
    request = StopRequest()
    request.poll()
    request.poll_alone()
    os.kill(os.getpid(), number)
    wait_for(request)
    for poll in (request.poll, request.poll_alone):
        with pytest.raises(StopRequested, match=rf"stopped on request \({number.name}\)"):
            poll()


def test_a_run_stops_by_itself_after_its_hours() -> None:
    for poll in (StopRequest(max_hours=1e-9).poll, StopRequest(max_hours=1e-9).poll_alone):
        with pytest.raises(StopRequested, match=r"stopped after train\.max_hours=1e-09"):
            poll()
    StopRequest(max_hours=1).poll()


def test_other_signals_are_not_meant() -> None:
    request = StopRequest()
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(request)
    signal.signal(signal.SIGUSR2, before)
    assert request.signal is signal.SIGTERM


def test_a_new_run_of_the_process_has_not_been_asked() -> None:
    first = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(first)
    StopRequest().poll()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_there_is_a_stop_request_is_recorded(number: signal.Signals) -> None:
    """As long as the command imports what it needs."""
    record_stop_signals()
    os.kill(os.getpid(), number)
    request = StopRequest()
    with pytest.raises(StopRequested, match=rf"stopped on request \({number.name}\)"):
        request.poll()
    StopRequest().poll()


def test_a_signal_that_was_taken_is_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that listens comes to it when it comes to run, here after the request."""
    is_taken, is_late = threading.Event(), threading.Event()

    def received_late(*details: Any) -> None:
        assert is_taken.wait(10)
        end_at_second_request(*details)
        is_late.set()

    monkeypatch.setattr(stop_signals, "end_at_second_request", received_late)
    record_stop_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(StopRequested, match="SIGINT"):
        StopRequest().poll()
    is_taken.set()
    assert is_late.wait(10)
    time.sleep(0.05)  # in which it would record it
    StopRequest().poll()


def test_a_recorded_signal_is_the_first_request(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    record_stop_signals()
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    os.kill(os.getpid(), signal.SIGUSR1)
    request = StopRequest()
    assert exits == []
    request._received(signal.SIGUSR1, 1000.0 + REPEAT_SECONDS)
    assert exits == [128 + signal.SIGUSR1]


def test_a_second_signal_ends_a_process_that_only_records(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that listens: Python calls no handler as long as the main thread is blocked."""
    now, arrivals = [1000.0], []
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        stop_signals, "end_at_second_request", lambda *details: arrivals.append(end_at_second_request(*details))
    )
    record_stop_signals()
    for num_arrived, seconds in enumerate((0.0, REPEAT_SECONDS - 1, REPEAT_SECONDS), start=1):
        now[0] = 1000.0 + seconds
        os.kill(os.getpid(), signal.SIGTERM)
        while len(arrivals) < num_arrived:
            time.sleep(0.001)
    assert exits == [128 + signal.SIGTERM]


@pytest.mark.parametrize(("content", "expected"), [("SIGTERM\n", "SIGTERM"), ("", "SIGUSR1"), (None, None)])
def test_a_signal_that_the_batch_script_has_received_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, expected: str | None
) -> None:
    """slurm/node.sh writes it; it may not have written all of it yet."""
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "signal"))
    if content is not None:
        (tmp_path / "signal").write_text(content)
    request = StopRequest()
    if expected is None:
        request.poll()
    else:
        with pytest.raises(StopRequested, match=expected):
            request.poll()


def test_one_request_in_several_signals_is_one(exits: list[int]) -> None:
    """Ctrl-C is SIGINT from the terminal and SIGTERM from the launcher, when that comes to it."""
    request = StopRequest()
    for number, seconds in (
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, 0.1),
        (signal.SIGTERM, REPEAT_SECONDS),
        (signal.SIGUSR1, 100.0),
    ):
        request._received(number, 1000.0 + seconds)
    assert exits == []
    assert request.signal is signal.SIGINT


@pytest.mark.parametrize("number", SIGNALS)
def test_the_same_signal_later_ends_the_process(exits: list[int], number: signal.Signals) -> None:
    request = StopRequest()
    request._received(number, 1000.0)
    request._received(number, 1000.0 + REPEAT_SECONDS)
    assert exits == [128 + number]


def test_a_request_that_another_rank_has_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest()
    notes = {request._announcement: "SIGUSR1"}
    monkeypatch.setattr(process_group, "announced", notes.get)
    with pytest.raises(StopRequested, match=r"\(SIGUSR1\)"):
        request.poll_alone()


def test_looking_for_announcements_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(process_group, "announced", lambda name: looks.append(name))
    request = StopRequest()
    for _ in range(1000):
        request.poll_alone()
    assert 1 <= len(looks) < 100


@pytest.mark.parametrize(
    ("parent", "grandparent", "ends", "stops"),
    [
        ("python -m deepspeed.launcher.launch train.py", "python /venv/bin/deepspeed train.py", "grandparent", True),
        ("python -m deepspeed.launcher.launch train.py", "python /venv/bin/deepspeed train.py", "parent", True),
        ("python -m deepspeed.launcher.launch train.py", "bash job.sh", "grandparent", False),
        ("bash -c train.py", "sshd", "parent", False),  # nohup
    ],
)
def test_a_launcher_that_is_gone_is_a_request(
    monkeypatch: pytest.MonkeyPatch, parent: str, grandparent: str, ends: str, stops: bool
) -> None:
    parents, commands = {1000: 500, 500: 400}, {500: parent, 400: grandparent}
    monkeypatch.setattr(stop.os, "getppid", lambda: parents[1000])
    monkeypatch.setattr(stop, "_parent", lambda pid: parents.get(pid, 0))
    monkeypatch.setattr(stop, "_command", lambda pid: commands.get(pid, "").split(" "))
    request = StopRequest()
    request.poll()
    parents |= {500: 1} if ends == "grandparent" else {1000: 1}
    if stops:
        with pytest.raises(StopRequested, match="launcher has exited"):
            request.poll()
    else:
        request.poll()


class Clock:
    """Time that passes as a test says, and how often the ranks have met."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.meetings, self.slowest = 0.0, [], 0.0
        monkeypatch.setattr(stop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(process_group, "max_over_hosts", self.meet)

    def meet(self, requested: float, seconds: float) -> list[float]:
        self.meetings.append(self.now)
        return [requested, max(seconds, self.slowest)]

    def work(self, request: StopRequest, pieces: int, seconds: float) -> None:
        for _ in range(pieces):
            request.poll_in_time()
            self.now += seconds

    @property
    def longest(self) -> float:
        """Seconds between two meetings."""
        return max(after - before for before, after in pairwise(self.meetings))


def test_ranks_meet_once_a_second_however_many_micro_batches_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.work(StopRequest(), pieces=10_000, seconds=0.01)
    assert len(clock.meetings) < 120, "100 seconds, and some more meetings at the start"
    assert clock.longest < 1.1


@pytest.mark.parametrize("seconds", [1.0, 19.0, 600.0])
def test_ranks_meet_before_each_long_micro_batch(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock, request = Clock(monkeypatch), StopRequest()
    clock.now += 30  # until the base has been loaded
    clock.work(request, pieces=20, seconds=seconds)
    assert len(clock.meetings) == 20


def test_micro_batches_that_become_twenty_times_longer_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, request = Clock(monkeypatch), StopRequest()
    clock.work(request, pieces=1000, seconds=0.05)
    clock.work(request, pieces=200, seconds=1.0)
    assert clock.longest <= 20
    assert clock.meetings[-1] - clock.meetings[-2] <= 1.0, "after the first meeting they know"


def test_the_slowest_rank_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks compute the same number of calls, or they would wait for each other."""
    clock = Clock(monkeypatch)
    clock.slowest = 0.5
    clock.work(StopRequest(), pieces=1000, seconds=0.01)
    assert 490 <= len(clock.meetings) <= 510


def test_a_request_waits_for_the_next_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranks: none leaves while another one expects it in a collective."""
    clock, request = Clock(monkeypatch), StopRequest()
    clock.work(request, pieces=1000, seconds=0.1)
    request.signal = signal.SIGTERM
    asked_at = clock.now
    with pytest.raises(StopRequested, match="SIGTERM"):
        clock.work(request, pieces=1000, seconds=0.1)
    assert clock.now - asked_at <= 1.1
