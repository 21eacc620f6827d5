"""A signal as a flag: who runs this process has announced its end.

signals = Signals((signal.SIGTERM,))
signals.install()
...
if signals.received: save, and leave
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

_installed: weakref.WeakSet[Signals] = weakref.WeakSet()
_masks = threading.local()


class Signals:
    """Takes note of signals, in the main thread.

    Handlers that were there before are called as well. Those of Python and of the system would end
    the process and are not called; but a second Ctrl-C interrupts, as ever.

    Attributes:
        received: the number of the last one, or None.
        numbers: those that it takes note of.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.received: int | None = None
        self.numbers = tuple(numbers)
        self._previous: dict[int, Any] = {}
        self._ended = False

    def install(self) -> None:
        """From now on; Python allows it in the main thread alone, elsewhere nothing happens."""
        is_new = not (self._previous or self._ended)
        if is_new and threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in self.numbers}
            _installed.add(self)

    def restore(self) -> None:
        """Puts back the handlers that were there, unless another one has come since."""
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                if signal.getsignal(number) == self._receive:
                    signal.signal(number, self._before(number))
            self._ended = True
            _installed.discard(self)

    def _before(self, number: int) -> Any:
        """The handler that was there, unless it is one of ours that has ended: then its."""
        previous = self._previous.get(number)
        owner = getattr(previous, "__self__", None)
        if isinstance(owner, Signals) and owner._ended:
            return owner._before(number)
        return signal.SIG_DFL if previous is None else previous

    def _receive(self, number: int, frame: FrameType | None) -> None:
        previous = self._before(number)
        if self._ended:  # called by a handler that came later
            signal.signal(number, previous)
            os.kill(os.getpid(), number)
            return
        again, self.received = self.received is not None, number
        if callable(previous) and (again or previous is not signal.default_int_handler):
            previous(number, frame)


def _before_fork() -> None:
    # Python drops what comes between the fork and its first steps in the child: it has to wait.
    numbers = [number for signals in list(_installed) for number in signals.numbers]
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    """A forked process has a life of its own, and ends when it is told."""
    for signals in list(_installed):
        signals.restore()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
