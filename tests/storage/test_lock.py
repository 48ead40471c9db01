"""One at a time, whoever holds the lock file and however it ends."""

import os
import signal
import threading
from pathlib import Path

import pytest

from qvtune.storage.lock import exclusive


def nothing() -> None:
    pass


def test_the_file_is_there_as_long_as_the_lock_is_held(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with exclusive(path, nothing):
        assert path.exists()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), exclusive(path, nothing):
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []


def test_others_wait_and_never_hold_it_together(tmp_path: Path) -> None:
    holding, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal holding, most
        for _ in range(3):
            with exclusive(tmp_path / "lock", nothing):
                with lock:
                    holding += 1
                    most = max(most, holding)
                with lock:
                    holding -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (holding, most) == (0, 1)


def test_who_waits_can_give_up(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with exclusive(tmp_path / "lock", nothing):
        with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "lock", stop):
            pytest.fail("the lock is held")
        assert (tmp_path / "lock").exists(), "by the other"


def test_a_process_that_is_killed_holds_it_no_longer(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        with exclusive(tmp_path / "lock", nothing):
            os.write(write_end, b".")
            signal.pause()
    assert os.read(read_end, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", lambda: pytest.fail("nobody holds it")):
        pass
    assert not (tmp_path / "lock").exists()
