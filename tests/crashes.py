"""A process that dies at a chosen change of the file system, without a process to lose.

for crash in crashes(lambda: fc.save(path, tree)):   # once for each change that it makes
    ...                                              # what a later process would find
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHANGES = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "chmod")


class Killed(BaseException):
    """The process is gone: from here on no change happens any more."""


@contextlib.contextmanager
def _before_each_change(check: Callable[[int, str, Any], None]) -> Iterator[None]:
    """Calls `check` with the number, from 0, the name and the arguments of each change."""
    count = itertools.count()

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            check(next(count), name, args)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrap(name))
        yield


@contextlib.contextmanager
def dying_at(k: int) -> Iterator[list[str]]:
    """Change number `k` does not happen, nor any after it."""
    made: list[str] = []

    def check(number: int, name: str, args: Any) -> None:
        if number >= k:
            raise Killed(f"at change {k}, {name} {args}")
        made.append(name)

    with _before_each_change(check):
        yield made


@contextlib.contextmanager
def failing_at(k: int) -> Iterator[list[str]]:
    """Change number `k` fails with an error of the file system; all others happen."""
    made: list[str] = []

    def check(number: int, name: str, args: Any) -> None:
        made.append(name)
        if number == k:
            raise OSError(5, f"injected into {name}", str(args[0]))

    with _before_each_change(check):
        yield made


def each_death(prepare: Callable[[int], Callable[[], Any]]) -> Iterator[int]:
    """Runs what `prepare(k)` returns so that it dies at change `k`, for every `k` that it has."""
    k = 0
    while True:
        act = prepare(k)
        try:
            with dying_at(k):
                act()
        except Killed:
            yield k
            k += 1
        else:
            assert k > 3, "hardly a change was seen"
            return
