"""A first signal is a request, a second an order."""

import os
import signal
from collections.abc import Iterator

import pytest

from qvtune.train.stop import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop and stop.signal is None
    os.kill(os.getpid(), number)
    assert stop and stop.signal is number


@pytest.mark.parametrize("number", SIGNALS)
def test_the_next_signal_ends_the_process(number: signal.Signals) -> None:
    StopRequest()
    os.kill(os.getpid(), number)
    assert {signal.getsignal(other) for other in SIGNALS} == {signal.SIG_DFL}
