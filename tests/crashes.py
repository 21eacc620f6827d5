"""A process that dies at a chosen change of the file system, without a process to lose.

for k in each_death(prepare):   # once for each change that is made
    ...                         # what a later process would find
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torture.calls import READS, Call, intercepted

_NO_CHANGES = READS | {"open", "close", "utime"}  # the heartbeat of whatever run is open


class Killed(BaseException):
    """The process is gone: from here on no change happens any more."""


@contextlib.contextmanager
def _before_each_change(check: Callable[[int, Call], None]) -> Iterator[list[str]]:
    """Calls `check` with the number, from 0, of each change; gives their names."""
    count, made = itertools.count(), list[str]()

    def around(call: Call, perform: Callable[..., Any]) -> Any:
        if call.name not in _NO_CHANGES:
            check(next(count), call)
            made.append(call.name)
        return perform()

    with intercepted("/", around):
        yield made


def dying_at(k: int) -> contextlib.AbstractContextManager[list[str]]:
    """Change number `k` does not happen, nor any after it."""

    def check(number: int, call: Call) -> None:
        if number >= k:
            raise Killed(f"at change {k}, {call}")

    return _before_each_change(check)


def failing_at(k: int) -> contextlib.AbstractContextManager[list[str]]:
    """Change number `k` fails with an error of the file system; all others happen."""

    def check(number: int, call: Call) -> None:
        if number == k:
            raise OSError(5, f"injected into {call.name}", call.path)

    return _before_each_change(check)


def each_death(prepare: Callable[[int], Callable[[], Any]]) -> Iterator[int]:
    """Runs what `prepare(k)` returns so that it dies at change `k`, for every `k` that it has."""
    for k in itertools.count():
        act = prepare(k)
        try:
            with dying_at(k):
                act()
        except Killed:
            yield k
        else:
            assert k > 3, "hardly a change was seen"
            return
