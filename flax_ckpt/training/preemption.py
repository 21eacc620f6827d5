"""A signal as a flag: who runs this process has announced its end.

signals = Signals((signal.SIGTERM,))
signals.install()
...
if signals.received: save, and leave
"""

import os
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
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}
        self._ended = False

    def install(self) -> None:
        """From now on; Python allows it in the main thread alone, elsewhere nothing happens."""
        if (
            not (self._previous or self._ended)
            and threading.current_thread() is threading.main_thread()
        ):
            self._previous = {s: signal.signal(s, self._receive) for s in self._signals}

    def restore(self) -> None:
        """Puts back the handlers that were there, unless another one has come since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals if self._previous else ():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, self._before(number))
        self._ended = True

    def _before(self, number: int) -> Any:
        """The handler that was there, unless it is one of ours that has ended: then its."""
        previous = self._previous.get(number)
        owner = getattr(previous, "__self__", None)
        if isinstance(owner, Signals) and owner._ended:
            return owner._before(number)
        return signal.SIG_DFL if previous is None else previous

    def _receive(self, number: int, frame: FrameType | None) -> None:
        previous = self._before(number)
        if self._ended or os.getpid() != self._pid:  # in a forked process, which has its own life
            signal.signal(number, previous)
            os.kill(os.getpid(), number)
            return
        again, self.received = self.received is not None, number
        if callable(previous) and (again or previous is not signal.default_int_handler):
            previous(number, frame)
