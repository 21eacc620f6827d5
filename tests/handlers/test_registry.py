"""Which handler takes what, in which order, and what a handler may rely on."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from flax_ckpt.errors import (
    AlreadyExistsError,
    DamagedCheckpointError,
    NoEntryError,
    NotHandleableError,
    UnsupportedLeafError,
)
from flax_ckpt.handlers import CheckpointableHandler, PathAwaitingCreation, StatefulCheckpointable


class Lines:
    """A value that only a handler of the user's knows."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lines) and other.lines == self.lines

    def __hash__(self) -> int:
        return hash(tuple(self.lines))


class LinesHandler:
    """As the documentation of `CheckpointableHandler` has it, without a base class."""

    filename = "lines.txt"

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        return self._write(directory, list(checkpointable.lines))

    async def _write(self, directory: PathAwaitingCreation, lines: list[str]) -> None:
        path = await directory.await_creation()
        (path / self.filename).write_text("\n".join(lines))

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        return self._read(directory)

    async def _read(self, directory: Any) -> Lines:
        return Lines(*(directory / self.filename).read_text().split("\n"))

    async def metadata(self, directory: Any) -> int:
        return len((directory / self.filename).read_text().split("\n"))

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Lines)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        return isinstance(abstract_checkpointable, Lines)


class OtherHandler(LinesHandler):
    filename = "other.txt"


class GreedyHandler(LinesHandler):
    """Takes everything, also trees."""

    filename = "greedy.txt"

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        return self._write(directory, [repr(checkpointable)])

    def is_handleable(self, checkpointable: Any) -> bool:
        return True


def local(*handlers: Any, **bound: Any) -> fc.Context:
    context = fc.Context()
    context.checkpointables.registry = registry = fc.handlers.local_registry()
    for handler in handlers:
        registry.add(handler)
    for name, handler in bound.items():
        registry.add(handler, checkpointable_name=name)
    return context


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


def written(path: Path, name: str) -> list[str]:
    return sorted(p.name for p in (path / name).iterdir())


# Registering.


def test_handlers_are_recognised_by_their_methods() -> None:
    assert isinstance(LinesHandler(), CheckpointableHandler)
    assert not isinstance(Lines(), CheckpointableHandler)
    assert isinstance(fc.handlers.PyTreeHandler(), CheckpointableHandler)


def test_a_users_handler_for_all_that_it_accepts(path: Path) -> None:
    with local(LinesHandler):
        fc.save_checkpointables(path, {"notes": Lines("a", "b"), "state": {"n": 1}})
        assert fc.load_checkpointables(path) == {"notes": Lines("a", "b"), "state": {"n": 1}}
        assert fc.checkpointables_metadata(path).metadata == {"notes": 2, "state": {"n": 0}}
    recorded = json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert recorded["notes"] == f"{__name__}.LinesHandler"


def test_metadata_of_all_have_none_for_one_without_a_handler(path: Path) -> None:
    with local(LinesHandler), fc.training.Checkpointer(path) as run:
        run.save_checkpointables(1, {"notes": Lines("a"), "state": {"n": 1}})
    described = {"notes": None, "state": {"n": 0}}
    with fc.training.Checkpointer(path) as run:
        assert run.checkpointables_metadata(1).metadata == described
    found = fc.checkpointables_metadata(path / "1")
    assert list(found.metadata.items()) == list(described.items())
    with pytest.raises(NoEntryError, match="'notes' was saved by .*LinesHandler"):
        fc.load_checkpointables(path / "1", found)
    with pytest.raises(NoEntryError, match="'notes' was saved by .*LinesHandler"):
        fc.metadata(path / "1", "notes")


def test_a_handler_bound_to_a_name_is_used_for_it_alone(path: Path) -> None:
    with local(LinesHandler, notes=OtherHandler):
        fc.save_checkpointables(path, {"notes": Lines("a"), "more": Lines("b")})
        assert fc.load_checkpointables(path) == {"notes": Lines("a"), "more": Lines("b")}
    assert (written(path, "notes"), written(path, "more")) == (["other.txt"], ["lines.txt"])


def test_the_last_registered_that_accepts_it_saves(path: Path) -> None:
    with local(LinesHandler, OtherHandler):
        fc.save_checkpointables(path, {"notes": Lines("a")})
    assert written(path, "notes") == ["other.txt"]


def test_a_greedy_handler_takes_trees_only_if_registered_last(path: Path, tmp_path: Path) -> None:
    with local(GreedyHandler):
        fc.save_checkpointables(path, {"tree": {"n": 1}})
    assert written(path, "tree") == ["greedy.txt"]
    fc.save_checkpointables(tmp_path / "two", {"tree": {"n": 1}})
    assert "_METADATA" in written(tmp_path / "two", "tree")


def test_to_load_the_name_then_the_recorded_type_then_the_abstract_value(path: Path) -> None:
    with local(LinesHandler):
        fc.save_checkpointables(path, {"notes": Lines("a")})
    (path / "notes" / "other.txt").write_text("other")
    with local(LinesHandler, OtherHandler):  # the recorded one, though not the last
        assert fc.load_checkpointables(path) == {"notes": Lines("a")}
        assert fc.load_checkpointables(path, {"notes": Lines()}) == {"notes": Lines("a")}
    with local(LinesHandler, notes=OtherHandler):  # the name beats it
        assert fc.load_checkpointables(path) == {"notes": Lines("other")}
    with local(OtherHandler):  # the recorded one is not here
        assert fc.load_checkpointables(path, {"notes": Lines()}) == {"notes": Lines("other")}
        with pytest.raises(
            NoEntryError, match=r"'notes' was saved by .*LinesHandler, which is not"
        ):
            fc.load_checkpointables(path)


def test_a_secondary_type_string_is_an_alias(path: Path) -> None:
    with local(LinesHandler):
        fc.save_checkpointables(path, {"notes": Lines("a")})
    context = fc.Context()
    context.checkpointables.registry = registry = fc.handlers.local_registry()
    (path / "notes" / "other.txt").write_text("other")
    registry.add(OtherHandler, secondary_typestrs=[f"{__name__}.LinesHandler"])
    assert registry.get_secondary_typestrs(OtherHandler) == (f"{__name__}.LinesHandler",)
    with context:
        assert fc.load_checkpointables(path) == {"notes": Lines("other")}


def test_a_tree_is_recognised_without_its_type_string(path: Path) -> None:
    fc.save(path, {"n": 1})
    for file in ("_CHECKPOINT_METADATA", "flax_ckpt.json"):
        (path / file).unlink()
    assert fc.load_checkpointables(path) == {"state": {"n": 1}}


def test_a_value_that_nobody_takes_is_named_with_its_checkpointable(path: Path) -> None:
    parts = {"state": {"n": 1}, "notes": Lines("a")}
    with pytest.raises((NoEntryError, UnsupportedLeafError), match="notes") as raised:
        fc.save_checkpointables_async(path, parts)
    assert "Lines" in str(raised.value)
    assert list(path.parent.iterdir()) == []


def test_without_any_handler_that_could_the_registered_ones_are_listed(path: Path) -> None:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry(include_global_registry=False)
    context.checkpointables.registry.add(fc.handlers.ProtoHandler)
    with context, pytest.raises(NoEntryError) as raised:
        fc.save_checkpointables_async(path, {"notes": Lines("a")})
    assert isinstance(raised.value, KeyError)
    expected = "checkpointable 'notes': no handler accepts a Lines; registered: ProtoHandler."
    assert str(raised.value).startswith(expected)


def test_registering_twice_is_an_error() -> None:
    registry = fc.handlers.local_registry()
    registry.add(LinesHandler).add(LinesHandler, checkpointable_name="a")
    with pytest.raises(AlreadyExistsError, match="LinesHandler is registered already"):
        registry.add(LinesHandler)
    with pytest.raises(AlreadyExistsError, match="'a' is bound to LinesHandler already"):
        registry.add(OtherHandler, checkpointable_name="a")
    assert registry.has("a")
    assert registry.get("a") is LinesHandler
    assert not registry.has("b")
    with pytest.raises(NoEntryError, match="no handler is bound to the name 'b'"):
        registry.get("b")


def test_an_instance_is_no_handler_class() -> None:
    with pytest.raises(TypeError, match="classes, not instances"):
        fc.handlers.local_registry().add(LinesHandler())


def test_a_class_that_needs_arguments_says_so(path: Path) -> None:
    class Needy(LinesHandler):
        def __init__(self, argument: int) -> None:
            self.argument = argument

    with local(notes=Needy), pytest.raises(TypeError, match="Needy cannot be built without"):
        fc.save_checkpointables(path, {"notes": Lines("a")})


def test_local_registries_leave_the_global_one_alone() -> None:
    before = fc.handlers.global_registry().get_all_entries()
    registry = fc.handlers.local_registry().add(LinesHandler)
    assert (LinesHandler, None) in registry.get_all_entries()
    assert fc.handlers.global_registry().get_all_entries() == before
    bare = fc.handlers.local_registry(include_global_registry=False)
    assert bare.get_all_entries() == ()
    both = fc.handlers.local_registry(bare.add(OtherHandler))
    assert both.get_all_entries()[-1] == (OtherHandler, None)


def test_registries_that_overlap_are_not_merged_silently() -> None:
    registry = fc.handlers.local_registry()
    with pytest.raises(AlreadyExistsError):  # as in Orbax
        fc.handlers.local_registry(registry)
    merged = fc.handlers.local_registry(registry, include_global_registry=False)
    assert merged.get_all_entries() == registry.get_all_entries()


def test_a_registry_without_the_tree_handler_saves_no_trees(path: Path) -> None:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry(include_global_registry=False)
    with context, pytest.raises(NoEntryError, match="registered: none"):
        fc.save_checkpointables(path, {"state": {"n": 1}})


def test_a_bound_handler_that_refuses_the_value_names_both(path: Path) -> None:
    with local(config=fc.handlers.ProtoHandler), pytest.raises(NotHandleableError, match="config"):
        fc.save_checkpointables(path, {"config": [1]})


# Nothing is imported because a checkpoint names it.


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and leaves a file if it is."""
    name = "flax_ckpt_test_trap"
    (tmp_path / "modules").mkdir()
    source = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Handler: pass\n"
    (tmp_path / "modules" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["{trap}.Handler", "os.system", "builtins.eval", "posix.system"])
def test_type_strings_are_not_imported(path: Path, tmp_path: Path, trap: str, kind: str) -> None:
    with local(LinesHandler):
        fc.save_checkpointables(path, {"notes": Lines("a"), "state": {"n": 1}})
    (path / "flax_ckpt.json").unlink()
    root = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    root["item_handlers"] = dict.fromkeys(("notes", "state"), kind.format(trap=trap))
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(root))
    assert fc.load(path) == {"n": 1}  # the tree is recognised by its files
    with pytest.raises(NoEntryError, match="was saved by"):
        fc.load_checkpointables(path)
    assert fc.checkpointables_metadata(path).metadata == {"notes": None, "state": {"n": 0}}
    assert trap not in sys.modules
    assert not (tmp_path / "sprung").exists()


def test_message_names_are_not_imported(path: Path, tmp_path: Path, trap: str) -> None:
    fc.save_checkpointables(path, {"config": Duration(seconds=3)})
    (path / "flax_ckpt.json").unlink()
    file = path / "config" / "proto.pbtxt"
    file.write_text(file.read_text().replace("google.protobuf.Duration", f"{trap}.Handler"))
    with pytest.raises(fc.errors.FormatError, match="no message that this process knows"):
        fc.load_checkpointables(path)
    assert trap not in sys.modules
    assert not (tmp_path / "sprung").exists()


# Two phases.


class Spy(LinesHandler):
    """Notes what happens when, and in which thread."""

    notes: list[Any]

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        assert isinstance(directory, PathAwaitingCreation)
        inner = directory / "a" / "b"
        Spy.notes.append(("snapshot", threading.current_thread() is threading.main_thread()))
        Spy.notes.append((directory.name, os.fspath(directory.path), inner.name, str(inner.path)))
        Spy.notes.append(os.path.exists(directory.path))
        return self._write(directory, list(checkpointable.lines))

    async def _write(self, directory: PathAwaitingCreation, lines: list[str]) -> None:
        begun.wait(60)
        path = await directory.await_creation()
        Spy.notes.append(("written", path.is_dir(), str(path) == str(directory.path)))
        await super()._write(directory, lines)


begun = threading.Event()


def test_saving_blocks_for_the_snapshot_alone(path: Path) -> None:
    Spy.notes = []
    begun.clear()
    value = Lines("before")
    with local(notes=Spy):
        response = fc.save_checkpointables_async(path, {"notes": value})
        assert Spy.notes[0] == ("snapshot", True)  # in the caller's thread
        name, where, inner, inner_path = Spy.notes[1]
        assert (name, inner, inner_path) == ("notes", "b", f"{where}/a/b")
        assert Spy.notes[2] is False  # not yet created
        assert len(Spy.notes) == 3
        value.lines = ["after"]
        begun.set()
        response.result()
        assert Spy.notes[3] == ("written", True, True)
        assert fc.load_checkpointables(path) == {"notes": Lines("before")}


class Waiting(LinesHandler):
    seen: list[BaseException]

    async def _write(self, directory: PathAwaitingCreation, lines: list[str]) -> None:
        try:
            await directory.await_creation()
        except BaseException as error:
            Waiting.seen.append(error)
            raise


@pytest.mark.filterwarnings(
    "error::RuntimeWarning", "error::pytest.PytestUnraisableExceptionWarning"
)
def test_when_the_directory_cannot_be_made_the_save_fails_without_a_sound(tmp_path: Path) -> None:
    Waiting.seen = []
    (tmp_path / "file").touch()
    with local(notes=Waiting), pytest.raises(OSError, match="file"):
        fc.save_checkpointables(tmp_path / "file" / "ckpt", {"notes": Lines("a"), "s": {"n": 1}})
    assert all(isinstance(error, OSError) for error in Waiting.seen)


def test_await_creation_raises_what_kept_the_directory_from_being_made(tmp_path: Path) -> None:
    """Also for a handler that began to wait for it in a task of its own, in `save`."""
    caught: list[BaseException] = []

    class Early(LinesHandler):
        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            def wait() -> None:
                try:
                    asyncio.run(directory.await_creation())
                except BaseException as error:
                    caught.append(error)

            self.thread = threading.Thread(target=wait)
            self.thread.start()
            return self._join()

        async def _join(self) -> None:
            self.thread.join(60)

    (tmp_path / "file").touch()
    with local(notes=Early), pytest.raises(OSError, match="file"):
        fc.save_checkpointables(tmp_path / "file" / "ckpt", {"notes": Lines("a")})
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(60)
    assert [type(error) for error in caught] == [fc.errors.CheckpointExistsError]


class Failing(LinesHandler):
    async def _write(self, directory: PathAwaitingCreation, lines: list[str]) -> None:
        await directory.await_creation()
        raise RuntimeError("the background part failed")


class FailingEarly(LinesHandler):
    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        raise RuntimeError("the snapshot failed")


def test_a_failing_snapshot_is_an_error_of_the_call(path: Path) -> None:
    with local(notes=FailingEarly), pytest.raises(RuntimeError, match="the snapshot failed"):
        fc.save_checkpointables_async(path, {"state": {"n": np.ones(2)}, "notes": Lines("a")})
    assert list(path.parent.iterdir()) == []


def test_a_failing_background_part_leaves_nothing(path: Path) -> None:
    with local(notes=Failing):
        response = fc.save_checkpointables_async(
            path, {"state": {"n": np.ones(2)}, "notes": Lines("a")}
        )
        with pytest.raises(RuntimeError, match="the background part failed") as raised:
            response.result()
    assert f"while saving the checkpoint {path}" in raised.value.__notes__
    assert list(path.parent.iterdir()) == []


def test_a_handler_may_return_any_awaitable(path: Path) -> None:
    class Rest:
        def __init__(self, directory: Any) -> None:
            self.directory = directory

        def __await__(self) -> Any:
            where = yield from self.directory.await_creation().__await__()
            (where / "lines.txt").write_text("x")

    class Handler(LinesHandler):
        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            return Rest(directory)

    with local(notes=Handler):
        fc.save_checkpointables(path, {"notes": Lines("a")})
        assert fc.load_checkpointables(path) == {"notes": Lines("x")}


# Objects that save themselves.


class Counter:
    """A data iterator: its state is a number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    async def save(self, directory: PathAwaitingCreation) -> Awaitable[None]:
        return self._write(directory, self.value)

    async def _write(self, directory: PathAwaitingCreation, value: int) -> None:
        path = await directory.await_creation()
        (path / "counter").write_text(str(value))

    async def load(self, directory: Any) -> Awaitable[None]:
        return self._read(directory)

    async def _read(self, directory: Any) -> None:
        self.value = int((directory / "counter").read_text())


def test_a_stateful_checkpointable_saves_and_loads_itself(path: Path) -> None:
    counter = Counter(5)
    assert isinstance(counter, StatefulCheckpointable)
    response = fc.save_checkpointables_async(path, {"data": counter, "state": {"n": 1}})
    counter.value = 6
    response.result()
    target = Counter()
    loaded = fc.load_checkpointables(path, {"data": target, "state": None})
    assert loaded["data"] is target
    assert target.value == 5
    assert loaded["state"] == {"n": 1}


def test_damage_to_the_file_of_a_stateful_checkpointable_is_noticed(path: Path) -> None:
    fc.save_checkpointables(path, {"data": Counter(5)})
    (path / "data/counter").write_text("6")
    target = Counter()
    with pytest.raises(DamagedCheckpointError, match="data/counter: CRC-32C"):
        fc.load_checkpointables(path, {"data": target})
    assert target.value == 0


def test_without_an_object_its_state_goes_nowhere(path: Path) -> None:
    fc.save_checkpointables(path, {"data": Counter(5), "state": {"n": 1}})
    with pytest.raises(NotHandleableError, match="'data' loads its state into an object: give one"):
        fc.load_checkpointables(path)
    assert fc.load_checkpointables(path, {"state": None}) == {"state": {"n": 1}}
    assert fc.checkpointables_metadata(path).metadata["data"] is None
