"""Work that is divided among processes of this machine."""

import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from qvtune.distributed.stop_signals import SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")
Poll = Callable[[], None]
Work = Callable[[Item, Poll], Result]

_POLL_SECONDS = 0.2
_WAITING_PER_WORKER = 1  # items that are read ahead, so that no process waits for the next one
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def in_processes(work: Work[Item, Result], items: Iterable[Item], num_workers: int, poll: Poll) -> Iterator[Result]:
    """``work(item, poll)`` for every item, in any order; items and results are pickled, ``work`` is not.

    The processes are forks of this one, so nothing is imported again, and memory that nobody changes is shared. They
    ignore stop signals and end with this process. ``poll`` is called several times a second and may raise. What
    ``work`` is given as ``poll`` raises in the forks when this generator ends. With one worker, or one item, everything
    takes place in this process.

    Raises RuntimeError where a process has been killed from outside.
    """
    iterator = iter(items)
    first = list(islice(iterator, 2))
    iterator = chain(first, iterator)
    if num_workers == 1 or len(first) < 2:
        for item in iterator:
            yield work(item, poll)
        return
    stop = mmap.mmap(-1, 1)  # shared with the forks
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(work, stop, os.getpid())
    )
    try:
        yield from _results(executor, iterator, num_workers * (1 + _WAITING_PER_WORKER), poll)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that tokenizes was killed, most likely because the memory was full: data.num_workers sets how "
            "many there are; what is finished is kept"
        ) from error
    finally:
        stop[0] = 1
        executor.shutdown(cancel_futures=True)


def _results(executor: ProcessPoolExecutor, items: Iterator[Any], num_waiting: int, poll: Poll) -> Iterator[Any]:
    pending: set[Future[Any]] = set()
    while True:
        pending |= {executor.submit(_call, item) for item in islice(items, num_waiting - len(pending))}
        if not pending:
            return
        done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
        poll()
        for future in done:
            yield future.result()


class _StoppedError(Exception):
    pass


_in_fork: dict[str, Any] = {}


def _start(work: Work[Any, Any], stop: mmap.mmap, parent: int) -> None:
    """In a fork, once."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # what is there already need not be looked at again and again, nor be copied for that
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    _in_fork.update(work=work, stop=stop)


def _call(item: Any) -> Any:
    return _in_fork["work"](item, _poll)


def _poll() -> None:
    if _in_fork["stop"][0]:
        raise _StoppedError
