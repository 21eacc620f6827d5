"""Our handlers pass the suite for handlers; handlers that break one rule each do not."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from flax_ckpt.handlers.stateful import StatefulHandler
from flax_ckpt.handlers.text import MetricsHandler
from flax_ckpt.testing import HandlerTests


class TestPyTreeHandler(HandlerTests):
    handler = fc.handlers.PyTreeHandler

    def values(self) -> Sequence[Any]:
        arrays = {"jax": jnp.arange(6.0).reshape(2, 3), "numpy": np.arange(4), "n": 7}
        return [arrays, [{"text": "a", "none": None}, 2.5], np.ones(3, np.int8)]

    def abstracts(self, value: Any) -> Sequence[Any]:
        def abstract(leaf: Any) -> Any:
            return jax.typeof(leaf) if isinstance(leaf, jax.Array) else type(leaf)

        return [jax.tree.map(abstract, value), value]

    def refused(self) -> Sequence[Any]:
        return [object(), {"a": object()}, {"a": np.array(["text"])}]

    def change(self, value: Any) -> None:
        if isinstance(value, dict):
            value["jax"].delete()
            value["numpy"][:] = -1
            value["n"] = 8

    def same(self, found: Any, saved: Any) -> bool:
        def equal(a: Any, b: Any) -> bool:
            return type(a) is type(b) and bool(np.array_equal(a, b))

        return all(jax.tree.leaves(jax.tree.map(equal, found, saved)))


class TestProtoHandler(HandlerTests):
    handler = fc.handlers.ProtoHandler

    def values(self) -> Sequence[Any]:
        return [Duration(seconds=1, nanos=2), Duration()]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [Duration]

    def refused(self) -> Sequence[Any]:
        return [Duration, {}, b""]

    def refused_abstracts(self) -> Sequence[Any]:
        return [int, {}, Duration()]

    def change(self, value: Any) -> None:
        value.seconds += 1


class TestJsonHandler(HandlerTests):
    handler = fc.handlers.JsonHandler

    def values(self) -> Sequence[Any]:
        return [{"a": [1, None, "é"], "b": {}}, [1.5], "text"]

    def refused(self) -> Sequence[Any]:
        return [object(), {1: 2}, np.ones(2)]

    def change(self, value: Any) -> None:
        if not isinstance(value, str):
            value.clear()


class TestMetricsHandler(TestJsonHandler):
    handler = MetricsHandler


class Counter:
    """Saves and loads itself."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    async def save(self, directory: Any) -> Awaitable[None]:
        return self._write(directory, self.value)

    async def _write(self, directory: Any, value: int) -> None:
        ((await directory.await_creation()) / "counter").write_text(str(value))

    async def load(self, directory: Any) -> Awaitable[None]:
        return self._read(directory)

    async def _read(self, directory: Any) -> None:
        self.value = int((directory / "counter").read_text())


class TestStatefulHandler(HandlerTests):
    handler = StatefulHandler
    needs_abstract = True

    def values(self) -> Sequence[Any]:
        return [Counter(5), Counter(-1)]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [Counter()]

    def change(self, value: Any) -> None:
        value.value += 1

    def same(self, found: Any, saved: Any) -> bool:
        return found.value == saved.value


class Place:
    """Says where it is, and can be put there."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def get_state(self) -> Any:
        return self.value

    def set_state(self, state: Any) -> None:
        self.value = state


class TestStatefulHandlerOfStates(TestStatefulHandler):
    def values(self) -> Sequence[Any]:
        return [Place(5), Place({"rows": [1, 2], "rng": (b"\x00\xff", None)})]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [Place()]

    def refused(self) -> Sequence[Any]:
        return [object(), {"a": 1}, [1]]

    def change(self, value: Any) -> None:
        if isinstance(value.value, dict):
            value.value["rows"].append(3)
        else:
            value.value += 1


# A handler of a user's, which passes; each of its subclasses breaks one rule.


class Note:
    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note) and other.text == self.text

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Note({self.text!r})"


class NoteHandler:
    async def save(self, directory: Any, checkpointable: Any) -> Any:
        return self.write(directory, checkpointable.text)

    async def write(self, directory: Any, text: str) -> None:
        path = await (directory / "inner").await_creation()
        path.mkdir()
        (path / "note.json").write_text(json.dumps(text))

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        return self.read(directory)

    async def read(self, directory: Any) -> Any:
        return Note(json.loads((directory / "inner" / "note.json").read_text()))

    async def metadata(self, directory: Any) -> Any:
        return Note

    def is_handleable(self, checkpointable: Any) -> Any:
        return isinstance(checkpointable, Note)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> Any:
        return abstract_checkpointable is Note


class TestNoteHandler(HandlerTests):
    handler = NoteHandler

    def values(self) -> Sequence[Any]:
        return [Note("one"), Note("two")]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [Note]

    def refused_abstracts(self) -> Sequence[Any]:
        return [int, Note("one")]

    def change(self, value: Any) -> None:
        value.text = "changed"


class WithoutMetadata:
    save, load = NoteHandler.save, NoteHandler.load
    is_handleable, is_abstract_handleable = (lambda *_: True), (lambda *_: True)


class WithArguments(NoteHandler):
    def __init__(self, filename: str) -> None: ...


def unnameable() -> Any:
    class Local(NoteHandler): ...

    return Local


class Greedy(NoteHandler):
    def is_handleable(self, checkpointable: Any) -> Any:
        return True


class Choosy(NoteHandler):
    def is_handleable(self, checkpointable: Any) -> Any:
        return False


class GreedyToLoad(NoteHandler):
    def is_abstract_handleable(self, abstract_checkpointable: Any) -> Any:
        return True


class ChoosyToLoad(NoteHandler):
    def is_abstract_handleable(self, abstract_checkpointable: Any) -> Any:
        return False


class TooEarly(NoteHandler):
    async def save(self, directory: Any, checkpointable: Any) -> Any:
        directory.path.mkdir(exist_ok=True)
        return self.write(directory, checkpointable.text)


class NeverWaiting(NoteHandler):
    async def write(self, directory: Any, text: str) -> None:
        os.makedirs(directory.path / "inner", exist_ok=True)
        (directory.path / "inner" / "note.json").write_text(json.dumps(text))


class Astray(NoteHandler):
    async def write(self, directory: Any, text: str) -> None:
        await super().write(directory, text)
        (directory.path.parent / "note.json").write_text(text)


class WritingAtOnce(NoteHandler):
    async def save(self, directory: Any, checkpointable: Any) -> Any:
        await self.write(directory, checkpointable.text)


class WithoutSnapshot(NoteHandler):
    async def save(self, directory: Any, checkpointable: Any) -> Any:
        return self.late(directory, checkpointable)

    async def late(self, directory: Any, note: Note) -> None:
        await self.write(directory, note.text)


class SharingState(NoteHandler):
    text: ClassVar[str] = ""

    async def save(self, directory: Any, checkpointable: Any) -> Any:
        SharingState.text = checkpointable.text
        return self.late(directory)

    async def late(self, directory: Any) -> None:
        await self.write(directory, SharingState.text)


class Lossy(NoteHandler):
    async def write(self, directory: Any, text: str) -> None:
        await super().write(directory, text.upper())


class BlindToTheWish(NoteHandler):
    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        return self.read(directory) if abstract_checkpointable is None else self.nothing()

    async def nothing(self) -> Any:
        return None


class Consuming(NoteHandler):
    async def read(self, directory: Any) -> Any:
        found = await super().read(directory)
        (directory / "inner" / "read").touch()
        return found


class OnTheMainThread(NoteHandler):
    async def read(self, directory: Any) -> Any:
        assert threading.current_thread() is threading.main_thread(), "not the MainThread"
        return await super().read(directory)


class WithALoopOfItsOwn(NoteHandler):
    async def save(self, directory: Any, checkpointable: Any) -> Any:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return self.late(directory, checkpointable.text, waiting)

    async def late(self, directory: Any, text: str, waiting: asyncio.Future[None]) -> None:
        await waiting
        await self.write(directory, text)


class WaitingForMetadata(NoteHandler):
    async def metadata(self, directory: Any) -> Any:
        return await asyncio.to_thread(lambda: Note)


class WrongMetadata(NoteHandler):
    async def metadata(self, directory: Any) -> Any:
        return "a note"


class TrustingTheBytes(fc.handlers.PyTreeHandler):
    """Of a tree only what is read is checked, and what a subclass reads by itself is not."""

    TYPESTR = "tests.TrustingTheBytes"
    save, write, metadata = NoteHandler.save, NoteHandler.write, NoteHandler.metadata
    load, read = NoteHandler.load, NoteHandler.read
    is_handleable = NoteHandler.is_handleable
    is_abstract_handleable = NoteHandler.is_abstract_handleable


class NamedByItsClass(NoteHandler):
    async def write(self, directory: Any, text: str) -> None:
        path = await directory.await_creation()
        (path / type(self).__name__).write_text(text)

    async def read(self, directory: Any) -> Any:
        return Note((directory / type(self).__name__).read_text())


BROKEN: list[tuple[Any, str, str]] = [
    (WithoutMetadata, "it_is_a_handler", "lacks methods of CheckpointableHandler"),
    (WithArguments, "it_is_a_handler", "missing 1 required positional argument"),
    (unnameable(), "it_is_a_handler", "checkpoints name it .*<locals>.Local: define it in a"),
    (Greedy, "it_says_what_it_takes", "takes <object object"),
    (Choosy, "it_says_what_it_takes", r"does not take Note\('one'\)"),
    (GreedyToLoad, "it_says_what_it_takes", "loads into <class 'int'>"),
    (ChoosyToLoad, "it_says_what_it_takes", "does not load into <class"),
    (
        TooEarly,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        r"\['item'\] was written before the creation",
    ),
    (
        NeverWaiting,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        "never awaited its directory's creation",
    ),
    (
        Astray,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        "{'note.json'} was written beside",
    ),
    (
        WritingAtOnce,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        "`save` returned None, not the rest",
    ),
    (
        WithoutSnapshot,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        r"changed after `save`.*saved Note\('one'\), loaded Note\('changed'\)",
    ),
    (
        SharingState,
        "it_saves_what_is_there_at_the_call_where_and_when_it_may",
        r"saves overlapped: saved Note\('one'\), loaded Note\('two'\)",
    ),
    (
        Lossy,
        "it_loads_what_it_saved_and_leaves_it_as_it_is",
        r"into None: saved Note\('one'\), loaded Note\('ONE'\)",
    ),
    (
        BlindToTheWish,
        "it_loads_what_it_saved_and_leaves_it_as_it_is",
        "into <class.*Note'>: saved .* loaded None",
    ),
    (Consuming, "it_loads_what_it_saved_and_leaves_it_as_it_is", "loading changed the checkpoint"),
    (OnTheMainThread, "it_works_in_the_background_of_any_caller", "MainThread"),
    (WithALoopOfItsOwn, "it_works_in_the_background_of_any_caller", "attached to a different loop"),
    (WaitingForMetadata, "it_loads_what_it_saved_and_leaves_it_as_it_is", "`metadata` waits"),
    (WrongMetadata, "it_loads_what_it_saved_and_leaves_it_as_it_is", "does not load into 'a note'"),
    (TrustingTheBytes, "damage_is_noticed", "inner/note.json was damaged|Invalid|Expecting|codec"),
    (NamedByItsClass, "it_may_be_renamed", "Renamed"),
]


@pytest.mark.parametrize(
    ("handler", "test", "message"), BROKEN, ids=[handler.__name__ for handler, *_ in BROKEN]
)
def test_a_handler_that_breaks_a_rule_fails(
    handler: Any, test: str, message: str, tmp_path: Path
) -> None:
    suite = type("Suite", (TestNoteHandler,), {"handler": handler})()
    run: Callable[..., None] = getattr(suite, f"test_{test}")
    arguments = [tmp_path][: run.__code__.co_argcount - 1]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=message):
        run(*arguments)


def test_every_test_of_the_suite_can_fail() -> None:
    tests = {name for name in dir(HandlerTests) if name.startswith("test_")}
    assert {f"test_{test}" for _, test, _ in BROKEN} == tests


def test_what_an_author_forgot_is_told() -> None:
    forgetful = type("Suite", (HandlerTests,), {"handler": NoteHandler})
    with pytest.raises(TypeError, match="abstract class Suite with abstract method '?values'?$"):
        forgetful()
    without_forms = type("Suite", (TestNoteHandler,), {"needs_abstract": True})()
    without_forms.abstracts = lambda value: []
    with pytest.raises(AssertionError, match="`abstracts` gives no abstract form"):
        without_forms.forms(0)
