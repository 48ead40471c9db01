"""The collective between two nodes that are processes of this machine."""

import sys
from pathlib import Path

import pytest

from tests.support.processes import run_command

# Two nodes with one rank each; then one node that waits for another, which never connects.
SCRIPT = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from qvtune.doctor.collective import Workers
from qvtune.doctor.rendezvous import Member, Membership
from qvtune.distributed.ports import any_free_port

def members(*nodes):
    return Membership(tuple(Member(node, f"n{node}", 0, 1) for node in nodes), any_free_port())

with Workers() as first, Workers() as second, Workers() as lonely, ThreadPoolExecutor() as pool:
    both, deadline = members(3, 5), time.monotonic() + 60
    of_second = pool.submit(second.try_collective, both, "127.0.0.1", 5, deadline)
    for finding in first.try_collective(both, "127.0.0.1", 3, deadline) + of_second.result():
        print(finding.status, finding.detail)
    (finding,) = lonely.try_collective(members(0, 1), "127.0.0.1", 0, time.monotonic() + 3)
    print(finding.status, finding.detail)
    assert lonely.try_collective(members(0), "127.0.0.1", 0, deadline) == []
"""


@pytest.mark.distributed
def test_correct_values_and_an_end_in_time(tmp_path: Path) -> None:
    done = run_command([sys.executable, "-c", SCRIPT], tmp_path, timeout=120)
    assert done.code == 0, done.output
    first, second, lonely = done.stdout.splitlines()
    assert (
        first.startswith("ok correct values; all-reduce ")
        and "with gloo (2 ranks)" in first
        and first[:8] == second[:8]
    )
    assert lonely.startswith("fail "), done.output


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from qvtune.distributed.bandwidth import measure_bandwidth

    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(1))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "all_gather", lambda parts, own: parts[0].copy_(own))
    with pytest.raises(ValueError, match="all-reduce gave wrong values"):
        measure_bandwidth("", 0, 1, 0, 1.0)
