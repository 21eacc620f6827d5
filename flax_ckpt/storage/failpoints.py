"""Points at which a test ends the process, or fails a change of the file system.

    FLAX_CKPT_FAILPOINT="commit.rename:before=kill@2" python train.py

A point lies before and after each change that a module makes through `files`; it is called as the
module and the change. `kill` ends the process there, `raise` fails as the file system would, the
first time or the one that is named after `@`. Without the variable at import there are no points.
"""

import collections
import errno
import functools
import inspect
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

VARIABLE: Final = "FLAX_CKPT_FAILPOINT"

_SYNTAX: Final = r"(\w+\.\w+:(before|after)=(kill|raise)(@[1-9]\d*)?)?"

if not re.fullmatch(_SYNTAX, chosen := os.environ.get(VARIABLE, "")):
    raise ValueError(f"{VARIABLE} is like 'commit.rename:before=kill@2', got {chosen!r}")

_FILES: Final = __name__.replace("failpoints", "files")
_counting = threading.Lock()
_seen: collections.Counter[str] = collections.Counter()


def around(change: Callable[P, T]) -> Callable[P, T]:
    """The change with a point on either side; itself, if the variable is not set."""
    if VARIABLE not in os.environ:
        return change

    @functools.wraps(change)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        point = f"{_module()}.{change.__name__.strip('_')}"
        reach(f"{point}:before")
        result = change(*args, **kwargs)
        reach(f"{point}:after")
        return result

    return call


def _module() -> str:
    """The module that called one of `files`; `files` itself, in a thread that it has made."""
    frame, inner = inspect.currentframe(), {__name__, _FILES, "contextlib", "threading"}
    while frame and ((name := frame.f_globals["__name__"]) in inner or "concurrent" in name):
        frame = frame.f_back
    name = frame.f_globals["__name__"] if frame else _FILES
    return name.rpartition(".")[2].lstrip("_")


def reach(point: str) -> None:
    """Does what the variable says of a point.

    Raises:
        OSError: it says `raise`.
    """
    with _counting:
        _seen[point] += 1
        count = _seen[point]
    chosen, _, rest = os.environ[VARIABLE].partition("=")
    action, _, time = rest.partition("@")
    if chosen != point or count != int(time or 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.EIO, f"failpoint {point}")
