"""Stopping on request: a signal sets a flag, the loop saves and leaves."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signal is not None
