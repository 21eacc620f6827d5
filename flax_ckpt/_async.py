"""Work in the background whose failure cannot get lost.

An :class:`AsyncResponse` is a running thread with a result. Its error surfaces at `result()`; if
nobody asks, at the end of the process: standard error names it and the exit code is not 0.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

import jax

_jax: Any = jax  # which says nothing about the types of its settings
P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("flax_ckpt")

_lock = threading.Lock()
_unsurfaced: set[AsyncResponse[Any]] = set()  # running, or failed and not yet told to anyone


class AsyncResponse(Generic[T]):
    """What the `*_async` functions return: a thread that was started and will have a result.

    Args:
        work: what to run; the context variables of the caller are visible to it.
        what: names the work in error messages, e.g. `checkpoint /ckpt/100`.
        verb: what it does to it, for messages at the end of the process.
        reported: whether a failure that nobody asks for fails the process at its end.
        then: called after success, in the same thread, before what `on_complete` is given.
        begun: set when nothing keeps the work from being done any more, not even an interrupt.

    Attributes:
        completed: whether the work itself has ended well, whatever becomes of what follows it.
        ended: set when all has ended, well or not.
        told: whether its failure was raised by `result`.
    """

    def __init__(
        self,
        work: Callable[[], T],
        what: str,
        *,
        verb: str = "saved",
        reported: bool = True,
        then: Callable[[], None] | None = None,
        begun: threading.Event | None = None,
    ) -> None:
        self.what, self.verb = what, verb
        self._value: T | None = None
        self.error: BaseException | None = None
        self.completed = self.told = False
        self.ended = threading.Event()
        self._callbacks: list[Callable[[T], None]] = [lambda _: then()] if then else []
        # The thread starts now, not on demand: once the main thread has ended, none can start.
        # Its work begins when `start` has returned: else the caller would wait up to 5 ms for the
        # GIL, and one that was interrupted there would not know that the work goes on.
        self._decided, self._begun = threading.Event(), begun or threading.Event()
        name, within = f"flax_ckpt {what}", contextvars.copy_context().run
        thread = threading.Thread(target=within, args=(self._run, work), name=name)
        try:
            if reported:
                with _lock:
                    _unsurfaced.add(self)
            thread.start()
            self._begun.set()
        finally:
            if not self._begun.is_set():
                with _lock:
                    _unsurfaced.discard(self)
            self._decided.set()

    def _run(self, work: Callable[[], T]) -> None:
        self._decided.wait()
        if not self._begun.is_set():
            return
        try:
            self._value = work()
            self.completed = True
            while True:
                with _lock:
                    if not self._callbacks:
                        _unsurfaced.discard(self)
                        self.ended.set()
                        return
                    callback = self._callbacks.pop(0)
                callback(self._value)  # type: ignore[arg-type]
        except BaseException as error:  # kept, and raised in the caller's thread or at exit
            self.error = error
        finally:
            self.ended.set()

    def done(self) -> bool:
        """Whether the work has ended, well or not."""
        return self.ended.is_set()

    def result(self, timeout: float | None = None) -> T:
        """Waits for the end and returns the result, or raises what went wrong.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            TimeoutError: it still runs.
        """
        # Not `Thread.join`: interrupted by Ctrl-C, it takes the thread for ended (bpo-45274).
        if not self.ended.wait(timeout):
            raise TimeoutError(f"{self.what}: still running after {timeout} s")
        if self.error is not None:
            with _lock:
                _unsurfaced.discard(self)  # it will not fail the exit
                self.told = True
            raise self.error
        return self._value  # type: ignore[return-value]

    def on_complete(self, callback: Callable[[T], None]) -> None:
        """Calls `callback` with the result after success, at once if it is there already."""
        with _lock:
            if not self.ended.is_set():
                self._callbacks.append(callback)
                return
        if self.error is None:
            callback(self._value)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self.error else "done"
        return f"<AsyncResponse {self.what}: {state}>"


def parameters_of(other: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Gives a function that hands all its arguments on to another the parameters of that one."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        shown: Any = function
        returned = inspect.signature(function).return_annotation
        shown.__signature__ = inspect.signature(other).replace(return_annotation=returned)
        return shown

    return decorate


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, in this thread, or beside a loop that runs here already."""
    if asyncio._get_running_loop() is None:
        return _drive(coroutine)
    context, drive = contextvars.copy_context(), with_settings(lambda: _drive(coroutine))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(context.run, drive).result()


def _drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, but the event loop that the caller has set stays the one that is set."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(coroutine)


def with_settings(work: Callable[[], T]) -> Callable[[], T]:
    """`work` for another thread, with what this one has set: JAX's device, mesh, 64 bits."""
    mesh = None
    with contextlib.suppress(ValueError):  # within `jit` none is set
        mesh = jax.sharding.get_mesh()
    device, wide = _jax.config.jax_default_device, _jax.config.jax_enable_x64

    def run() -> T:
        with contextlib.ExitStack() as settings:
            settings.enter_context(jax.default_device(device))
            if hasattr(jax, "enable_x64"):  # JAX 0.8
                settings.enter_context(_jax.enable_x64(wide))
            if mesh is not None and not mesh.empty:
                settings.enter_context(jax.set_mesh(mesh))
            return work()

    return run


def forget_in_child(lock: Any, forget: Callable[[], object]) -> None:
    """A forked process starts with the lock free, and without what the parent's threads do."""
    os.register_at_fork(
        before=lock.acquire,
        after_in_parent=lock.release,
        after_in_child=lambda: (forget(), lock.release()),
    )


class _ExitCode:
    """Ends the process with code 1 when the interpreter lets go of it, after all exit handlers.

    The interpreter ignores failures of threads and of exit handlers, and an `os._exit` in one of
    the latter would keep those registered before it from running. Only `sys` holds it, which is
    always cleared: a daemon thread that the end has caught in a call keeps other modules alive.
    """

    NAME = "_flax_ckpt_exit_code"

    def __init__(self) -> None:
        self._exit = os._exit

    def __del__(self) -> None:
        self._exit(1)


def _finish_pending() -> None:
    """Waits for all saves, and tells of those that failed and were not asked for."""
    with _lock:
        pending = sorted(_unsurfaced, key=lambda response: response.what)
    for response in pending:
        try:
            try:
                response.ended.wait()
            except KeyboardInterrupt:
                print(f"flax_ckpt: {response.what} is still being {response.verb}", file=sys.stderr)
            response.result()
        except BaseException as error:
            logger.debug("at exit", exc_info=error)
            if _ExitCode.NAME not in vars(sys):
                setattr(sys, _ExitCode.NAME, _ExitCode())
            reason = f"{type(error).__name__}: {error}"
            fate = f"was {'' if response.completed else 'NOT '}{response.verb}"
            fate += ", but what follows failed" if response.completed else ""
            print(f"flax_ckpt: {response.what} {fate}: {reason}", file=sys.stderr)


# When the main thread has ended, and before executors refuse work. `threading._register_atexit`
# runs its hooks in reverse order, so that of the executors, which naming the class registers, comes
# after ours. Once more among the exit handlers, for a save that began later. Tried on CPython 3.11
# and 3.13.
concurrent.futures.ThreadPoolExecutor  # noqa: B018
forget_in_child(_lock, _unsurfaced.clear)
threading._register_atexit(_finish_pending)  # type: ignore[attr-defined]
atexit.register(_finish_pending)
