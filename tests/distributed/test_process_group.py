"""Ranks and variables as one process sees them; what needs several is in tests/distributed."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qvtune.distributed import process_group
from qvtune.errors import StopRequested, UserError
from tests.support.processes import run_command

START = """
import json, os
from qvtune.distributed import process_group
process_group.start()
print(json.dumps({
    "variables": {
        name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    },
    "rank": process_group.rank(), "world_size": process_group.world_size(), "main": process_group.is_main(),
    "sum": process_group.sum_over_ranks(1.5, 2.0), "max": process_group.max_over_ranks(-1.0),
    "objects": process_group.all_gather_object("own"), "broadcast_object": process_group.broadcast_object({"a": 1}),
}))
process_group.stop()
process_group.stop()
"""


def test_plain_python_is_one_process(tmp_path: Path) -> None:
    finished = run_command([sys.executable, "-c", START], tmp_path, timeout=300)
    assert finished.code == 0, finished.output
    found = json.loads(finished.stdout.splitlines()[-1])
    port = int(found["variables"].pop("MASTER_PORT"))
    assert 1024 <= port < 65536
    assert found == {
        "variables": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        "rank": 0,
        "world_size": 1,
        "main": True,
        "sum": [1.5, 2.0],
        "max": [-1.0],
        "objects": ["own"],
        "broadcast_object": {"a": 1},
    }


def test_before_start_the_launchers_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (process_group.rank(), process_group.world_size(), process_group.local_rank()) == (5, 8, 1)
    assert not process_group.is_main()


def test_a_taken_port_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"port {port}, .* is in use, .* deepspeed --master_port N"):
            process_group.start()


def test_without_variables_this_is_the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (process_group.rank(), process_group.world_size(), process_group.local_rank()) == (0, 1, 0)
    assert process_group.is_main()
    own = torch.arange(3)
    assert process_group.all_gather_tensor(own)[0] is own, "no collective among one"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 6),
        ({"LOCAL_WORLD_SIZE": "2"}, 3),  # torchrun
        ({"LOCAL_SIZE": "3"}, 2),  # the deepspeed launcher
        ({"LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
def test_the_cores_are_shared_by_the_ranks_of_a_host(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    process_group._share_cores()
    assert torch.get_num_threads() == expected


def test_the_cores_are_shared_on_gpu_machines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is quantized on the CPU while it is loaded."""
    import deepspeed

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices, backends = [], []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, timeout: backends.append(backend))
    process_group.start()
    assert (torch.get_num_threads(), devices, backends) == (3, [1], ["nccl"])


def test_who_sets_the_number_of_threads_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    process_group._share_cores()
    assert torch.get_num_threads() == 1


def test_the_timeout_of_collectives_is_half_an_hour_or_what_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVTUNE_TIMEOUT_SECONDS", raising=False)
    assert process_group.timeout() == timedelta(minutes=30)
    monkeypatch.setenv("QVTUNE_TIMEOUT_SECONDS", "45")
    assert process_group.timeout() == timedelta(seconds=45)


def test_torch_has_one_variable_that_searches_for_nan_in_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the header of the installed torch: another name would have to be read as well."""
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    (names,) = re.findall(r"> TORCH_NCCL_NAN_CHECK = \{([^}]*)\}", header.read_text())
    assert names.strip() == '"TORCH_NCCL_NAN_CHECK"'
    assert len(re.findall(r"\w*NAN_?CHECK\w* =", header.read_text())) == 1
    monkeypatch.delenv("TORCH_NCCL_NAN_CHECK", raising=False)
    assert process_group.nan_check() is None


def test_flags_over_host_memory_have_the_same_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside NCCL flags go through a gloo group, whose default timeout is half an hour whatever NCCL's is."""
    monkeypatch.setenv("QVTUNE_TIMEOUT_SECONDS", "45")
    made, new_group = [], dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(new_group(**options)) or made[-1])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        monkeypatch.setattr(process_group, "world_size", lambda: 2)
        assert process_group.max_over_hosts(1.0, -2.0) == [1.0, -2.0]
    finally:
        process_group._host_group.cache_clear()
        dist.destroy_process_group()
    (group,) = made
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=45)


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "10m"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QVTUNE_TIMEOUT_SECONDS", text)
    with pytest.raises(UserError, match="QVTUNE_TIMEOUT_SECONDS"):
        process_group.timeout()


def others_report(monkeypatch: pytest.MonkeyPatch, *problems: str, stop: str | None = None) -> None:
    """A second rank whose block ended with these problems, or with this request to stop."""
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: [own, (problems, stop)])


def fail(*problems: str) -> Callable[[], None]:
    def build() -> None:
        raise UserError(problems)

    return build


def test_raise_on_all_ranks_passes_when_no_rank_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    others_report(monkeypatch)
    with process_group.raise_on_all_ranks():
        done = True
    assert done


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (["mine"], [], ("mine",)),
        ([], ["theirs"], ("theirs",)),
        (["same", "mine"], ["same", "theirs"], ("same", "mine", "theirs")),
    ],
)
def test_raise_on_all_ranks_raises_the_problems_of_all_ranks_once_each(
    monkeypatch: pytest.MonkeyPatch, own: list[str], others: list[str], expected: tuple[str, ...]
) -> None:
    others_report(monkeypatch, *others)
    block = fail(*own) if own else lambda: None
    with pytest.raises(UserError) as caught, process_group.raise_on_all_ranks():
        block()
    assert caught.value.problems == expected


def request() -> None:
    raise StopRequested("mine")


@pytest.mark.parametrize(
    ("block", "stop", "expected"), [(request, None, "mine"), (request, "theirs", "mine"), (int, "theirs", "theirs")]
)
def test_raise_on_all_ranks_raises_a_request_to_stop_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, block: Callable[[], object], stop: str | None, expected: str
) -> None:
    others_report(monkeypatch, stop=stop)
    with pytest.raises(StopRequested, match=expected), process_group.raise_on_all_ranks():
        block()


def test_a_mistake_comes_before_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started again it would be there again."""
    others_report(monkeypatch, "wrong")
    with pytest.raises(UserError, match="wrong"), process_group.raise_on_all_ranks():
        request()


def test_one_rank_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_group.max_over_hosts(True, 0.25, -3) == [1.0, 0.25, -3.0]


def test_raise_on_all_ranks_lets_defects_through_without_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(process_group, "all_gather_object")
    with pytest.raises(ZeroDivisionError), process_group.raise_on_all_ranks():
        raise ZeroDivisionError


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_once_per_host_the_first_rank_builds_before_the_others(
    monkeypatch: pytest.MonkeyPatch, local_rank: str
) -> None:
    events: list[str] = []

    def gather(own: Any) -> list[Any]:
        events.append("meet")
        return [own]

    def build() -> str:
        events.append("build")
        return "built"

    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(process_group, "all_gather_object", gather)
    assert process_group.once_per_host(build) == "built"
    assert events == (["build", "meet", "meet"] if local_rank == "0" else ["meet", "build", "meet"])


def test_who_waits_for_a_build_is_in_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective would end the run after QVTUNE_TIMEOUT_SECONDS. The other of two ranks arrives late."""
    store, events = dist.HashStore(), []
    monkeypatch.setattr(process_group, "_store", lambda: store)
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(process_group, "_meetings", iter([7]))
    monkeypatch.setattr(process_group, "all_gather_object", lambda own: events.append("collective") or [own])

    def wait() -> None:
        with process_group.raise_on_all_ranks(however_long=True):
            events.append("built")

    thread = threading.Thread(target=wait)
    thread.start()
    while store.add("qvtune/arrived-7", 0) < 1:
        time.sleep(0.01)
    thread.join(0.1)
    assert thread.is_alive() and events == ["built"]
    store.add("qvtune/arrived-7", 1)
    thread.join()
    assert events == ["built", "collective"]


def test_once_per_host_raises_what_another_rank_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    others_report(monkeypatch, "no such file")
    with pytest.raises(UserError, match="no such file"):
        process_group.once_per_host(lambda: pytest.fail("the first rank's error ends it"))
