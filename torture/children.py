"""Processes to kill: forked from one that has imported everything and runs no threads of JAX."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from flax_ckpt.storage import failpoints, lock
from torture.scenarios import SCENARIOS


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    kept = {name: os.environ.get(name) for name in (failpoints.VARIABLE, "OPENBLAS_NUM_THREADS")}
    os.environ |= {failpoints.VARIABLE: "", "OPENBLAS_NUM_THREADS": "1"}
    forkserver.ensure_running()  # it takes the environment as it is now
    for name, value in kept.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    return context


class Child:
    """A process that runs a scenario, and says what it did and where it is.

    Args:
        scenario: its name.
        root: where.
        seed: of what it saves.
        failpoint: as the variable has it; "hold" for the action stops it there.
        points: whether it says which points it reaches.
    """

    def __init__(
        self, scenario: str, root: str, seed: int, failpoint: str = "", *, points: bool = True
    ) -> None:
        context = _server()
        self._reader, writer = context.Pipe(duplex=False)
        arguments = (writer, scenario, root, seed, failpoint, points)
        self.process = context.Process(target=_run, args=arguments)
        self.process.start()
        writer.close()
        self._rest = b""

    def said(self, timeout: float | None = None) -> list[list[Any]] | None:
        """What it says next; None if it says nothing for so many seconds, or has ended."""
        if timeout is not None and not self._reader.poll(timeout):
            return None
        data = os.read(self._reader.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return list(map(json.loads, lines)) if data else None

    def end(self) -> int:
        """Kills it, if it runs, and waits; its exit code."""
        self.process.kill()
        return self.wait()

    def wait(self) -> int:
        """Waits until it ends; its exit code."""
        self.process.join()
        code: int = self.process.exitcode
        return code


def _run(
    pipe: Connection, scenario: str, root: str, seed: int, failpoint: str, points: bool
) -> None:
    speaking = threading.Lock()

    def say(*what: Any) -> None:
        with speaking:
            os.write(pipe.fileno(), json.dumps(what).encode() + b"\n")

    held, _, rest = failpoint.partition("=hold")
    os.environ[failpoints.VARIABLE] = failpoint
    real, times = failpoints.reach, int(rest.removeprefix("@") or 1)

    def reach(point: str) -> None:
        nonlocal times
        if points:
            say("point", point)
        if failpoint != held and point == held:
            with speaking:
                times -= 1
                now = times == 0
            if now:
                say("held")
                threading.Event().wait()
        real(point)

    failpoints.reach = reach
    logging.getLogger("flax_ckpt").addHandler(logging.NullHandler())
    lock.STALE_SECS = 0.3  # a lock file without a word in it is waited for as long
    say("stage", "start")
    try:
        SCENARIOS[scenario](root, seed, say)
    except Exception as error:  # told to the parent, which knows whether there may be one
        notes = getattr(error, "__notes__", [])
        say("error", type(error).__name__, "; ".join([str(error), *notes]))
    say("end")
