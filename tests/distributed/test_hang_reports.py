"""Beats in shared memory, what watchers tell each other, and who is to blame; without ranks."""

import json
import os
from pathlib import Path

import pytest

from qvtune.distributed import heartbeat
from qvtune.distributed.hang_reports import HangFiles, Report, hung_twice, verdict_of
from qvtune.distributed.hang_watcher import innermost_frames, waits
from qvtune.distributed.heartbeat import Heartbeat

# As faulthandler writes them: the newest thread first, the main thread last.
STACKS = """Thread 0x00007f (most recent call first):
  File "/x/qvtune/distributed/stop_signals.py", line 73 in read
  File "/lib/threading.py", line 982 in run

Current thread 0x00008f (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/x/qvtune/train/loop.py", line 12 in train
"""


def files(tmp_path: Path, start: str = "1", hosts: tuple[str, ...] = ("n1", "n1", "n2")) -> HangFiles:
    return HangFiles(tmp_path / "logs", start, hosts)


def report(rank: int, host: str, *, is_waiting: bool, does: str = "it waits for other ranks") -> Report:
    return Report(rank, host, f"step 7, micro-batch {rank}", 15.2, does, is_waiting)


def test_another_process_reads_the_last_beat() -> None:
    own = Heartbeat()
    other = Heartbeat(os.dup(own.descriptor))
    with heartbeat.shared(own):
        heartbeat.beat("step 7, micro-batch 1 of 2")
        first = other.read()
        heartbeat.beat()
        second = other.read()
        assert first.where == second.where == "step 7, micro-batch 1 of 2" and second.number == first.number + 1
        assert second.is_limited
        with heartbeat.unlimited("downloads"):
            heartbeat.beat()
            assert (other.read().where, other.read().is_limited) == ("downloads", False)
        assert other.read().is_limited
        heartbeat.beat("é" * 1000)
        assert other.read().where.startswith("éé")
        last = other.read().number
    heartbeat.beat()  # there is no watcher any more
    assert other.read().number == last
    other.close()


def test_the_innermost_frame_says_who_waits() -> None:
    frames = innermost_frames(STACKS)
    assert [frame.split("/")[-1] for frame in frames] == [
        "stop_signals.py:73 read",
        "distributed_c10d.py:2810 all_reduce",
    ]
    assert [waits(frame) for frame in frames] == [False, True]
    assert not waits(f"{__file__}:1 read")


def test_a_line_that_synchronizes_the_device_waits(tmp_path: Path) -> None:
    """On a GPU the collective runs there, and Python stands where it needs a result."""
    source = tmp_path / "loop.py"
    source.write_text("loss = engine(batch)\nloss_sum += loss.item()\n")
    assert [waits(f"{source}:{line} train") for line in (1, 2)] == [False, True]


def test_the_rank_that_does_not_wait_is_to_blame(tmp_path: Path) -> None:
    found = files(tmp_path)
    for rank, host in ((0, "n1"), (2, "n2")):
        found.report(report(rank, host, is_waiting=rank == 0, does="its process is stopped"))
    message = found.write_verdict(found.reports(), "12", 0)
    assert message is not None
    assert "rank 2 on n2: last seen at step 7, micro-batch 2, 15 s ago; its process is stopped" in message
    assert "rank 0" not in message and "rank 1" not in message
    assert json.loads(found.verdict.read_text())["hung"] == [{"rank": 2, "host": "n2"}]
    assert found.write_verdict(found.reports(), "12", 0) is None, "only one rank gives the message"


def test_without_such_a_rank_the_one_without_a_report_is(tmp_path: Path) -> None:
    found = files(tmp_path)
    for rank in (0, 1):
        found.report(report(rank, "n1", is_waiting=True))
    message = found.write_verdict(found.reports(), None, 0)
    assert message is not None and "rank 2 on n2: no report" in message
    assert json.loads(found.verdict.read_text())["hung"] == [{"rank": 2, "host": "n2"}]


def test_nobody_is_to_blame_where_all_wait(tmp_path: Path) -> None:
    found = files(tmp_path)
    for rank, host in enumerate(found.hosts):
        found.report(report(rank, host, is_waiting=True))
    message = found.write_verdict(found.reports(), None, 0)
    assert message is not None and "all ranks wait for each other" in message
    assert all(f"rank {rank} on" in message for rank in range(3))
    assert json.loads(found.verdict.read_text())["hung"] == []


def test_a_report_is_withdrawn(tmp_path: Path) -> None:
    found = files(tmp_path)
    found.report(report(1, "n1", is_waiting=True))
    found.withdraw(1)
    found.withdraw(2)
    assert found.reports() == []


@pytest.mark.parametrize(("second_job", "twice"), [("12", ["n2"]), ("13", [])])
def test_a_host_hangs_twice_in_one_job(tmp_path: Path, second_job: str, twice: list[str]) -> None:
    for restart, (job, rank) in enumerate((("12", 2), (second_job, 2), (second_job, 0))):
        found = files(tmp_path, start=f"{restart}")
        found.report(report(rank, found.hosts[rank], is_waiting=False))
        found.write_verdict(found.reports(), job, restart)
    logs = tmp_path / "logs"
    assert hung_twice(logs, "12") == twice
    verdict = verdict_of(logs, "12", 0)
    assert verdict is not None and verdict["hung"] == [{"rank": 2, "host": "n2"}]
    assert verdict_of(logs, "12", 5) is None and verdict_of(tmp_path / "nowhere", "12", 0) is None
