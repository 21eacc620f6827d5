"""The suites: what an author says of the values that a handler is for, and the tests of it.

class TestPointHandler(HandlerTests):   # `HandlerTests` and `LeafTests` are `Samples`
    handler = PointHandler

    def values(self):
        return [Point(1, 2.5), Point(-1, 0)]
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import inspect
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from etils import epath

from flax_ckpt import _async
from flax_ckpt._load import load, load_checkpointables, metadata
from flax_ckpt._save import save, save_checkpointables, save_checkpointables_async
from flax_ckpt.context import Context
from flax_ckpt.errors import FormatError, TreeMismatchError
from flax_ckpt.format import tree
from flax_ckpt.handlers import PyTreeHandler, global_registry, local_registry
from flax_ckpt.handlers.base import CheckpointableHandler, HandlerType, PathAwaitingCreation
from flax_ckpt.handlers.registry import typestr
from flax_ckpt.leaves.base import LeafHandler
from flax_ckpt.leaves.registry import LeafRegistry

_NAME = "item"  # of the checkpointable in the checkpoints that are saved here


class Samples(abc.ABC):
    """Values to save, and what belongs to them. Define `values`, and the rest where it differs.

    Attributes:
        needs_abstract: whether a value only loads into an abstract form that the caller gives.
    """

    handler: ClassVar[Any]
    needs_abstract: ClassVar[bool] = False
    _asked: ClassVar[tuple[str, str]]  # methods that say what a handler saves, and loads into

    @abc.abstractmethod
    def values(self) -> Sequence[Any]:
        """Values to save, one at least: new objects at each call, equal to those before."""

    def abstracts(self, value: Any) -> Sequence[Any]:
        """Abstract forms that load `value` as it was saved; None need not be among them."""
        return ()

    def misfits(self, value: Any) -> Sequence[Any]:
        """Abstract forms that the handler takes, but that `value` does not fit."""
        return ()

    def refused(self) -> Sequence[Any]:
        """Values that the handler does not take."""
        return (object(),)

    def refused_abstracts(self) -> Sequence[Any]:
        """Abstract forms that it does not take."""
        return (object(),)

    def change(self, value: Any) -> None:  # noqa: B027 (most can not be changed)
        """Changes `value` in place, if it can be changed."""

    def same(self, found: Any, saved: Any) -> bool:
        """Whether what was loaded is what was saved."""
        return bool(found == saved)

    def test_it_says_what_it_takes(self) -> None:
        """What the handler says of values and abstract forms is true of what it takes, no more."""
        takes, loads = (getattr(self.handler(), name) for name in self._asked)
        for value in self.values():
            assert takes(value) is True, f"does not take {value!r}"
            for abstract in (*self.abstracts(value), *self.misfits(value)):
                assert loads(abstract) in (True, None), f"does not load into {abstract!r}"
        for value in self.refused():
            assert takes(value) is False, f"takes {value!r}"
        for abstract in self.refused_abstracts():
            assert loads(abstract) in (False, None), f"loads into {abstract!r}"

    def forms(self, index: int) -> list[Any]:
        """All abstract forms of a value, None included if it is one."""
        forms = [*([] if self.needs_abstract else [None]), *self.abstracts(self.values()[index])]
        assert forms, "`needs_abstract` is set, but `abstracts` gives no abstract form"
        return forms

    def check(self, found: Any, index: int, when: str) -> None:
        """Compares what was loaded with a new object that is like the one saved."""
        saved = self.values()[index]
        assert self.same(found, saved), f"{when}: saved {saved!r}, loaded {found!r}"


class HandlerTests(Samples):
    """Tests of a checkpointable handler.

    Attributes:
        handler: the class, as it is registered: built without arguments.

    >>> from google.protobuf.duration_pb2 import Duration
    >>> import flax_ckpt as fc
    >>> class TestProtoHandler(HandlerTests):
    ...     handler = fc.handlers.ProtoHandler
    ...
    ...     def values(self):
    ...         return [Duration(seconds=1), Duration()]
    ...
    ...     def abstracts(self, value):
    ...         return [Duration]
    >>> TestProtoHandler().test_it_says_what_it_takes()
    """

    handler: ClassVar[HandlerType]
    _asked = "is_handleable", "is_abstract_handleable"

    def test_it_is_a_handler(self) -> None:
        """It has the methods, is built without arguments, and checkpoints can name it."""
        lacks = f"{self.handler.__name__} lacks methods of CheckpointableHandler"
        assert isinstance(self.handler(), CheckpointableHandler), lacks
        name = typestr(self.handler)
        assert "<locals>" not in name, f"checkpoints name it {name}: define it in a module"

    def test_it_saves_what_is_there_at_the_call_where_and_when_it_may(self, tmp_path: Path) -> None:
        """`save` takes the snapshot, and returns the rest, which waits for its directory.

        Before the rest runs, the value may change and other saves may begin.
        """

        async def overlapping() -> None:
            begun: list[tuple[_Directory, Any]] = []
            for i, value in enumerate(self.values()):
                directory = _Directory(epath.Path(tmp_path / str(i) / _NAME))
                rest: Any = await self.handler().save(directory, value)
                told = f"`save` returned {rest!r}, not the rest as an awaitable"
                assert inspect.isawaitable(rest), told
                self.change(value)
                begun.append((directory, rest))
            await asyncio.gather(*(rest for _, rest in reversed(begun)))
            for i, (directory, _) in enumerate(begun):
                assert directory.made, "the background part never awaited its directory's creation"
                beside = set(os.listdir(directory.path.parent)) - {_NAME}
                assert not beside, f"{beside} was written beside the directory"
                when = "the value was changed after `save`, and other saves overlapped"
                found = await (await self.handler().load(directory.path, self.forms(i)[0]))
                self.check(found, i, when)

        _async.run(overlapping())

    def test_it_loads_what_it_saved_and_leaves_it_as_it_is(self, tmp_path: Path) -> None:
        """Bound to a name or not, into each abstract form, as often as one likes.

        One form is what `metadata` returns, which waits for nothing.
        """
        for bound in (_NAME, None):
            with self._context(checkpointable_name=bound):
                for i, path in enumerate(self._saved(tmp_path / str(bound))):
                    before = _files(path)
                    metadata = self.handler().metadata(epath.Path(path / _NAME))
                    described = _async.run(_at_once(metadata))
                    for form in 2 * [*self.forms(i), *([] if described is None else [described])]:
                        found = load_checkpointables(path, {_NAME: form})[_NAME]
                        self.check(found, i, f"loaded into {form!r}")
                    assert _files(path) == before, "loading changed the checkpoint"

    def test_it_works_in_the_background_of_any_caller(self, tmp_path: Path) -> None:
        """Callers may be in another thread than the main one, and may run an event loop."""

        async def in_a_loop() -> None:
            self._round_trip(tmp_path / "in a loop")
            await asyncio.to_thread(self._round_trip, tmp_path / "in another thread")

        self._round_trip(tmp_path / "in the main thread")
        asyncio.run(in_a_loop())

    def test_damage_is_noticed(self, tmp_path: Path) -> None:
        """A changed byte or a lost file is a FormatError, or does not matter to the value."""
        with self._context():
            for i, path in enumerate(self._saved(tmp_path)):
                for file, whole in _files(path / _NAME).items():
                    for damaged in _damaged(whole):
                        file.unlink()
                        if damaged is not None:
                            file.write_bytes(damaged)
                        with contextlib.suppress(FormatError):  # it was noticed
                            when = f"{os.path.relpath(file, path)} was damaged"
                            self.check(self._load(path, i), i, when)
                        file.write_bytes(whole)

    def test_it_may_be_renamed(self, tmp_path: Path) -> None:
        """With its old type string among `secondary_typestrs`, its checkpoints load."""
        renamed = type("Renamed", (self.handler,), {})
        with self._context():
            paths = self._saved(tmp_path)
        with self._context(renamed, secondary_typestrs=[typestr(self.handler)]):
            for i, path in enumerate(paths):
                self.check(self._load(path, i), i, "the handler was renamed")

    def _context(self, handler: HandlerType | None = None, **more: Any) -> Context:
        context = Context()
        ours = any(self.handler is entry for entry, _ in global_registry().get_all_entries())
        registry = local_registry(include_global_registry=not ours)
        context.checkpointables.registry = registry.add(handler or self.handler, **more)
        return context

    def _saved(self, folder: Path) -> list[Path]:
        """Saves each value in a checkpoint of its own."""
        paths = [folder / str(i) for i in range(len(self.values()))]
        for path, value in zip(paths, self.values(), strict=True):
            save_checkpointables(path, {_NAME: value})
        return paths

    def _load(self, path: Path, index: int) -> Any:
        return load_checkpointables(path, {_NAME: self.forms(index)[0]})[_NAME]

    def _round_trip(self, path: Path) -> None:
        with self._context():
            for i, value in enumerate(self.values()):
                response = save_checkpointables_async(path / str(i), {_NAME: value})
                self.change(value)
                response.result()
                self.check(self._load(path / str(i), i), i, path.name)


class _Directory:
    """A directory that is made when its creation is awaited; before, nothing may be there."""

    def __init__(self, path: epath.Path, top: Any = None) -> None:
        self.path, self.name = path, path.name
        self.made = False
        self._top: _Directory = top or self
        self._top.path.parent.mkdir(exist_ok=True)

    def __truediv__(self, other: str | os.PathLike[str]) -> PathAwaitingCreation:
        return _Directory(self.path / other, self._top)

    async def await_creation(self) -> epath.Path:
        top = self._top
        if not top.made:
            early = os.listdir(top.path.parent)
            assert not early, f"{early} was written before the creation of the directory"
            top.path.mkdir()
            top.made = True
        return self.path


async def _at_once(awaitable: Awaitable[Any]) -> Any:
    try:
        next(awaitable.__await__())
    except StopIteration as end:
        return end.value
    raise AssertionError("`metadata` waits: it must end in the caller's thread")


def _files(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _damaged(whole: bytes) -> list[bytes | None]:
    """A bit flipped at the beginning, in the middle, at the end; and None: no file at all."""
    places = {0, len(whole) // 2, len(whole) - 1} if whole else ()
    return [*[whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places], None]


class LeafTests(Samples):
    """Tests of a leaf handler; values and their abstract forms are leaves.

    Attributes:
        handler: the class, built without arguments.

    >>> from flax_ckpt.leaves.host import StringLeaf
    >>> class TestStringLeaf(LeafTests):
    ...     handler = StringLeaf
    ...
    ...     def values(self):
    ...         return ["", "text"]
    >>> TestStringLeaf().test_it_says_what_it_takes()
    """

    handler: ClassVar[type[LeafHandler]]
    _asked = "handles", "handles_abstract"

    def test_it_is_a_leaf_handler(self) -> None:
        """It has the methods, and names the kind of leaf that it writes."""
        handler = self.handler()
        lacks = f"{self.handler.__name__} lacks methods of LeafHandler"
        assert isinstance(handler, LeafHandler), lacks
        known = {*handler.value_types, tree.ARRAY, tree.NUMPY, tree.SCALAR, tree.STRING}
        for value in self.values():
            kind = handler.write(value, copy=True).value_type
            assert kind in known, f"writes the kind {kind!r}, which is not among its value_types"
        assert not known & tree.EMPTY.keys(), "one of its value_types is that of an empty node"
        assert list(handler.build([], [])) == [], "of no targets it builds something"

    def test_a_leaf_may_change_once_it_is_written(self) -> None:
        """With `copy`, what `write` returns shares no memory that the caller may overwrite."""
        for value in self.values():
            written = self.handler().write(value, copy=True)
            before = [shard.data.tobytes() for shard in written.shards]
            self.change(value)
            after = [shard.data.tobytes() for shard in written.shards]
            assert after == before, f"what was written changed with {value!r}"

    def test_a_leaf_alone_and_one_of_its_metadata(self, tmp_path: Path) -> None:
        """Each abstract form loads the value; so does what `describe` returns."""
        with self._context():
            for i, value in enumerate(self.values()):
                path = tmp_path / str(i)
                save(path, value)
                described = [] if self.needs_abstract else [metadata(path).metadata]
                for form in described:
                    takes = self.handler().handles_abstract(form)
                    assert takes, f"`describe` returns {form!r}, which it does not take"
                for form in self.forms(i) + described:
                    self.check(load(path, form), i, f"loaded into {form!r}")

    def test_leaves_keep_their_places(self, tmp_path: Path) -> None:
        """Among other leaves and empty nodes; wanted alone, or not wanted."""
        values = self.values()
        forms = [self.forms(i)[0] for i in range(len(values))]
        context = self._context()
        context.pytree.loading.partial_load = True
        with context:
            save(tmp_path / "all", [*values, {}, 7, "text", None, np.arange(3), *values])
            found = load(tmp_path / "all", [*forms, {}, int, str, None, np.ndarray, *forms])
            for i, leaf in enumerate(found[: len(values)] + found[-len(values) :]):
                self.check(leaf, i % len(values), "loaded among others")
            others = found[len(values) : -len(values)]
            assert others[:4] == [{}, 7, "text", None], f"other leaves changed: {others}"
            save(tmp_path / "two", {"leaf": values[0], "n": 1})
            assert load(tmp_path / "two", {"n": int}) == {"n": 1}
            self.check(load(tmp_path / "two", {"leaf": forms[0]})["leaf"], 0, "loaded alone")

    def test_what_does_not_fit_is_told_by_path_with_both_sides(self, tmp_path: Path) -> None:
        """`target` returns how the wish reads, also where a string was saved."""
        text = {} if self.handler().handles("text") else {"text": "text"}
        with self._context():
            for i, value in enumerate(self.values()):
                save(tmp_path / str(i), {"leaf": value, **text})
                wishes = [{"leaf": misfit, **text} for misfit in self.misfits(value)]
                if text:
                    wishes += [{"leaf": self.forms(i)[0], "text": a} for a in self.abstracts(value)]
                for wish in wishes:
                    self._check_difference(tmp_path / str(i), wish)

    def _check_difference(self, path: Path, wish: Any) -> None:
        try:
            found = load(path, wish)
        except TreeMismatchError as error:
            (difference,) = error.differences
            told = difference.path in wish and difference.saved != difference.wanted
            assert told, f"says nothing of what differs: {difference}"
        else:
            raise AssertionError(f"{wish} does not fit, but it was loaded: {found}")

    def _context(self) -> Context:
        leaves = LeafRegistry(self.handler())

        class Trees(PyTreeHandler):
            def __init__(self) -> None:
                super().__init__(leaf_handler_registry=leaves)

        context = Context()
        context.checkpointables.registry = local_registry().add(Trees)
        return context
