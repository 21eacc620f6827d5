"""What the `*_async` functions return, and all functions inside a running event loop."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt import _save
from flax_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError

TREE = {"w": np.arange(5.0), "n": 3}


waiting = threading.Event()  # set by a save at its gate


class GateHandler:
    """Holds the background part of a save until the event is set."""

    async def save(self, directory: Any, gate: threading.Event) -> Awaitable[None]:
        return self._wait(directory, gate)

    async def _wait(self, directory: Any, gate: threading.Event) -> None:
        await directory.await_creation()
        waiting.set()
        assert gate.wait(60)

    async def load(self, directory: Any, abstract: Any = None) -> Awaitable[Any]:
        raise NotImplementedError

    async def metadata(self, directory: Any) -> None:
        return None

    def is_handleable(self, value: Any) -> bool:
        return isinstance(value, threading.Event)

    def is_abstract_handleable(self, abstract: Any) -> bool | None:
        return None


def held(path: Path, gate: threading.Event | None = None) -> tuple[Any, threading.Event]:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        GateHandler, checkpointable_name="gate"
    )
    gate = gate or threading.Event()
    with context:
        return fc.save_checkpointables_async(path, {"gate": gate, "state": TREE}), gate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


def check(loaded: Any) -> None:
    np.testing.assert_array_equal(loaded["w"], TREE["w"])
    assert loaded["n"] == 3


def test_result_with_a_timeout(path: Path) -> None:
    response, gate = held(path)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=f"{path}: still running after {timeout} s"):
            response.result(timeout=timeout)
    assert not path.exists()
    gate.set()
    assert response.result(timeout=60) is None
    assert response.result() is None
    check(fc.load(path))


def test_on_complete_before_and_after_the_end(path: Path) -> None:
    response, gate = held(path)
    calls: list[Any] = []
    response.on_complete(lambda value: calls.append(("first", value, path.exists())))
    response.on_complete(lambda value: calls.append(("second", value, path.exists())))
    assert calls == []
    gate.set()
    response.result()
    assert calls == [("first", None, True), ("second", None, True)]
    response.on_complete(lambda value: calls.append(("late", value)))
    assert calls[2] == ("late", None)


def test_on_complete_of_a_load_gets_the_value(path: Path) -> None:
    fc.save(path, TREE)
    calls: list[Any] = []
    response = fc.load_async(path)
    response.on_complete(calls.append)
    check(response.result())
    check(calls[0])


def test_callbacks_of_a_failed_save_are_not_called(path: Path) -> None:
    path.parent.joinpath("file").touch()
    response = fc.save_async(path.parent / "file" / "ckpt", TREE)
    calls: list[Any] = []
    response.on_complete(calls.append)
    for _ in range(2):
        with pytest.raises(OSError, match="file"):
            response.result()
    response.on_complete(calls.append)
    assert calls == []


def test_an_exception_in_a_callback_surfaces(path: Path) -> None:
    response, gate = held(path)

    def fail(_: Any) -> None:
        raise RuntimeError("in the callback")

    response.on_complete(fail)
    gate.set()
    with pytest.raises(RuntimeError, match="in the callback"):
        response.result()
    check(fc.load(path))  # it was committed before


def test_an_exception_in_a_late_callback_is_the_callers(path: Path) -> None:
    response = fc.save_async(path, TREE)
    response.result()

    def fail(_: Any) -> None:
        raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        response.on_complete(fail)
    assert response.result() is None


def test_the_post_finalization_callback_runs_after_the_commit(path: Path) -> None:
    calls: list[tuple[bool, bool]] = []
    context = fc.Context()
    main = threading.main_thread()
    context.asynchronous.post_finalization_callback = lambda: calls.append(
        (path.exists(), threading.current_thread() is main)
    )
    with context:
        fc.save(path, TREE)
    assert calls == [(True, False)]


def test_many_saves_in_flight(tmp_path: Path) -> None:
    responses = [fc.save_async(tmp_path / str(n), {"n": n, "w": TREE["w"]}) for n in range(12)]
    for response in reversed(responses):
        response.result()
    assert [fc.load(tmp_path / str(n))["n"] for n in range(12)] == list(range(12))


def test_loads_in_flight_and_a_missing_one(path: Path) -> None:
    fc.save(path, TREE)
    responses = [fc.load_async(path) for _ in range(4)]
    missing = fc.load_checkpointables_async(path.parent / "missing")
    for response in responses:
        check(response.result())
    with pytest.raises(CheckpointNotFoundError, match="missing"):
        missing.result()


def test_a_load_in_the_background_sees_the_context_of_the_call(path: Path) -> None:
    fc.save(path, TREE)
    context = fc.Context()
    context.pytree.loading.partial_load = True
    with context:
        response = fc.load_async(path, {"n": 0})
    assert response.result() == {"n": 3}


# In a notebook a loop runs already.


def test_everything_works_inside_a_running_loop(path: Path) -> None:
    async def cell() -> None:
        fc.save(path, TREE)
        check(fc.load(path))
        fc.save_async(path, TREE, overwrite=True).result()
        check(fc.load_async(path).result())
        fc.save_checkpointables(path.parent / "more", {"state": TREE, "other": {"a": 1}})
        check(fc.load_checkpointables(path.parent / "more")["state"])
        assert fc.metadata(path).metadata["n"] == 0
        assert set(fc.checkpointables_metadata(path.parent / "more").metadata) == {"state", "other"}

    asyncio.run(cell())


def test_errors_and_contexts_cross_a_running_loop(path: Path) -> None:
    async def cell() -> None:
        fc.save(path, TREE)
        with pytest.raises(CheckpointNotFoundError):
            fc.load(path.parent / "missing")
        context = fc.Context()
        context.pytree.loading.partial_load = True
        with context:
            assert fc.load(path, {"n": 0}) == {"n": 3}
        with pytest.raises(fc.errors.TreeMismatchError):
            fc.load(path, {"n": 0})

    asyncio.run(cell())


def test_the_traceback_of_an_error_has_no_unrelated_errors(path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as raised:
        fc.load(path)
    assert raised.value.__context__ is None
    fc.save(path, TREE)
    with pytest.raises(fc.errors.TreeMismatchError) as mismatch:
        fc.load(path, {"n": 0})
    assert mismatch.value.__context__ is None, "no running event loop is none of the user's matters"


def test_tasks_that_save_side_by_side(tmp_path: Path) -> None:
    async def save(number: int) -> None:
        response = fc.save_async(tmp_path / str(number), {"n": number})
        await asyncio.to_thread(response.result)

    async def cell() -> None:
        await asyncio.gather(*map(save, range(6)))

    asyncio.run(cell())
    assert [fc.load(tmp_path / str(n)) for n in range(6)] == [{"n": n} for n in range(6)]


# Ctrl-C.


def is_interrupted(path: Path, at: int, gate: threading.Event) -> bool:
    """Whether Ctrl-C came, at that line of `start`, or when its thread had just begun."""
    events = {_save.start.__code__: "line", fc.AsyncResponse.__init__.__code__: "return"}
    lines, before = itertools.count(1), sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code not in events:
            return None
        if _save._lock.locked():  # a signal never comes between the body of `with` and its end
            return trace
        if event == events[frame.f_code] and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        held(path, gate)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_save_that_goes_on_after_an_interrupt_keeps_its_place(tmp_path: Path) -> None:
    fates: set[bool] = set()
    for at in itertools.count(1):
        path, gate = tmp_path / str(at), threading.Event()
        waiting.clear()
        interrupted = is_interrupted(path, at, gate)
        threads = [t for t in threading.enumerate() if t.name == f"flax_ckpt checkpoint {path}"]
        while any(thread.is_alive() for thread in threads) and not waiting.wait(0.01):
            pass
        goes_on = waiting.is_set()
        if goes_on:
            with pytest.raises(CheckpointExistsError, match="is being saved right now"):
                fc.save(path, TREE)
            gate.set()
            threads[0].join(60)
        else:
            fc.save_async(path, TREE).result(60)
        check(fc.load(path))
        fates.add(goes_on)
        if not interrupted:
            break
    assert fates == {True, False}
    assert at > 20
