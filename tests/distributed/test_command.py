"""Exit codes, and who says what."""

import os
import signal
from typing import Never

import pytest

from qvtune.distributed import command, process_group
from qvtune.distributed.command import run_alone, run_command, run_on_rank_0
from qvtune.errors import StopRequested, UserError


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the process group, which is none here."""
    happened: list[str] = []
    monkeypatch.setattr(process_group, "start", lambda: happened.append("start"))
    monkeypatch.setattr(process_group, "stop", lambda: happened.append("stop"))
    monkeypatch.setattr(command, "record_stop_signals", lambda: None)  # pytest's own handlers stay
    return happened


def user_error(checked: object = None) -> Never:
    raise UserError(["the first is wrong", "the second too"])


def request(checked: object) -> Never:
    raise StopRequested("stopped on request (SIGTERM)")


def nothing() -> None:
    """A check that finds nothing wrong."""


def defect(checked: object = None) -> Never:
    raise ZeroDivisionError


@pytest.mark.parametrize("code", [0, 75])
def test_the_commands_own_code(calls: list[str], code: int) -> None:
    assert run_command(lambda: code, lambda checked: checked) == code
    assert calls == ["start", "stop"]


def test_a_request_before_there_was_anything_to_save(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(nothing, request) == 75
    assert capsys.readouterr().err.startswith("stopped on request (SIGTERM) before the first step")
    assert calls == ["start", "stop"], "all ranks leave together"


def test_a_persons_mistake_is_printed_without_a_traceback(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(nothing, user_error) == 2
    assert capsys.readouterr().err == "error: the first is wrong\nerror: the second too\n"
    assert calls == ["start", "stop"], "all ranks leave together"


def test_other_ranks_only_return_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(nothing, user_error) == 2
    assert capsys.readouterr().err == ""


def test_what_the_check_finds_is_said_without_a_process_group(
    calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(user_error, defect) == 2
    assert capsys.readouterr().err == "error: the first is wrong\nerror: the second too\n"
    assert calls == []


def test_other_ranks_leave_it_to_rank_0_and_only_then_say_it(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher kills them while they wait, unless rank 0 has no such error."""
    printed_before: list[str] = []
    monkeypatch.setattr(command.time, "sleep", lambda seconds: printed_before.append(capsys.readouterr().err))
    monkeypatch.setenv("RANK", "3")
    assert run_command(user_error, defect) == 2
    assert len(printed_before) > 1 and set(printed_before) == {""}
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("rank 3 on ") and said[1:] == ["error: the first is wrong", "error: the second too"]
    assert calls == []


def test_a_rank_that_the_launcher_ends_says_nothing(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM is recorded, not fatal: see qvtune.distributed.stop_signals."""
    arrived = iter([{}, {}, {signal.SIGTERM: 1.0}])
    monkeypatch.setattr(command, "take_recorded", lambda: next(arrived))
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "3")
    assert run_command(user_error, defect) == 2
    assert capsys.readouterr().err == "" and calls == []


def test_a_defect_is_raised_and_waits_for_nobody(calls: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(nothing, defect)
    assert calls == ["start"], "no collective after an error: the others may never come"


def test_alone(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_alone(lambda: None) == 0
    assert run_alone(user_error) == 2
    assert capsys.readouterr().err == "error: the first is wrong\nerror: the second too\n"
    with pytest.raises(ZeroDivisionError):
        run_alone(defect)
    assert calls == []


def test_rank_0_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a launcher, whose variables are not for what runs alone."""
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    found = []
    assert run_on_rank_0(lambda: found.append(process_group.world_size())) == 0
    assert found == [1]
    assert run_on_rank_0(user_error) == 2
    monkeypatch.setenv("RANK", "1")
    assert run_on_rank_0(defect) == 0, "not called"
    assert capsys.readouterr().err == "error: the first is wrong\nerror: the second too\n" and calls == []


@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_the_allocator_can_grow_unless_the_user_says_otherwise(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """Before CUDA starts, which is in ``process_group.start``."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(variable, "max_split_size_mb:128")  # so that it is restored afterwards
        if variable != chosen:
            monkeypatch.delenv(variable)
    seen: list[str | None] = []
    monkeypatch.setattr(process_group, "start", lambda: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    assert run_command(nothing, lambda checked: 0) == 0
    expected = {None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}
    assert seen == [expected.get(chosen)]
