"""A signal as a flag: who runs this process has announced its end.

signals = Signals((signal.SIGTERM,))
signals.install()
...
if signals.received: save, and leave
"""

import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any


class Signals:
    """Takes note of signals, in the main thread.

    Handlers that were there before are called as well. Those of Python and of the system would end
    the process and are not called; but a second Ctrl-C interrupts, as ever.

    Attributes:
        received: the number of the last one, or None.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        self.received: int | None = None
        self._signals = tuple(signals)
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """From now on; Python allows it in the main thread alone, elsewhere nothing happens."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in self._signals}

    def restore(self) -> None:
        """Puts back the handlers that were there, unless another one has come since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        previous = self._previous.get(number)
        if callable(previous) and (again or previous is not signal.default_int_handler):
            previous(number, frame)
