"""A process that dies at a chosen change of the file system, without a process to lose.

for crash in crashes(lambda: fc.save(path, tree)):   # once for each change that it makes
    ...                                              # what a later process would find
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHANGES = ("fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir", "chmod")


class Killed(BaseException):
    """The process is gone: from here on no change happens any more."""


@contextlib.contextmanager
def dying_at(k: int) -> Iterator[list[str]]:
    """Change number `k` does not happen, nor any after it."""
    made: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) >= k:
                raise Killed(f"at change {k}, {name} {args}")
            made.append(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrap(name))
        yield made


@contextlib.contextmanager
def failing_at(k: int) -> Iterator[list[str]]:
    """Change number `k` fails with an error of the file system; all others happen."""
    made: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == k + 1:
                raise OSError(5, f"injected into {name}", str(args[0]))
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, wrap(name))
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
