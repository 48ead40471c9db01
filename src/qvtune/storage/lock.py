"""One process at a time: a lock file, also between the hosts that share a file system."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.2


@contextmanager
def exclusive(path: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``, which is there only as long as somebody holds or awaits it.

    ``while_waiting`` is called several times a second and may raise. The lock ends with the process, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            while not _try_lock(file.fileno()):
                while_waiting()
                time.sleep(_POLL_SECONDS)
            if _is_still(path, file.fileno()):
                try:
                    yield
                finally:
                    path.unlink()
                return


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file that was opened is still there: who held the lock before has deleted it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
