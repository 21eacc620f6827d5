"""The suite for checkpointable handlers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from etils import epath

from flax_ckpt import _async
from flax_ckpt._load import load_checkpointables
from flax_ckpt._save import save_checkpointables, save_checkpointables_async
from flax_ckpt.context import Context
from flax_ckpt.errors import FormatError
from flax_ckpt.handlers import global_registry, local_registry
from flax_ckpt.handlers.base import CheckpointableHandler, HandlerType, PathAwaitingCreation
from flax_ckpt.handlers.registry import typestr
from flax_ckpt.testing.samples import Samples

_NAME = "item"  # of the checkpointable in the checkpoints that are saved here


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

    def _takes(self, value: Any) -> Any:
        return self.handler().is_handleable(value)

    def _loads(self, abstract: Any) -> Any:
        return self.handler().is_abstract_handleable(abstract)

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
        begun: list[tuple[_Directory, Any]] = []
        for i, value in enumerate(self.values()):
            directory = _Directory(epath.Path(tmp_path / str(i) / _NAME))
            rest: Any = _async.run(self._save(directory, value))
            told = f"`save` returned {rest!r}, not the rest as an awaitable"
            assert inspect.isawaitable(rest), told
            self.change(value)
            begun.append((directory, rest))
        _async.run(_finish([rest for _, rest in reversed(begun)]))
        for directory, _ in begun:
            assert directory.made, "the background part never awaited its directory's creation"
            beside = set(os.listdir(directory.path.parent)) - {_NAME}
            assert not beside, f"{beside} was written beside the directory"
        for i, (directory, _) in enumerate(begun):
            when = "the value was changed after `save`, and other saves overlapped"
            self.check(_async.run(self._read(directory.path, i)), i, when)

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
                    forms = [*self.forms(i), *([] if described is None else [described])]
                    for form in 2 * forms:
                        found = load_checkpointables(path, {_NAME: form})[_NAME]
                        self.check(found, i, f"loaded into {form!r}")
                    assert _files(path) == before, "loading changed the checkpoint"

    def test_it_works_in_the_background_of_any_caller(self, tmp_path: Path) -> None:
        """Callers may be in another thread than the main one, and may run an event loop."""

        async def in_a_loop() -> None:
            self._round_trip(tmp_path / "in a loop")

        self._round_trip(tmp_path / "in the main thread")
        asyncio.run(in_a_loop())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(self._round_trip, tmp_path / "in another thread").result()

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

    async def _save(self, directory: _Directory, value: Any) -> Awaitable[None]:
        return await self.handler().save(directory, value)

    async def _read(self, path: epath.Path, index: int) -> Any:
        return await (await self.handler().load(path, self.forms(index)[0]))

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


async def _finish(saves: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*saves)


async def _at_once(awaitable: Awaitable[Any]) -> Any:
    waiting = awaitable.__await__()
    try:
        next(waiting)
    except StopIteration as end:
        return end.value
    raise AssertionError("`metadata` waits: it must end in the caller's thread")


def _files(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _damaged(whole: bytes) -> list[bytes | None]:
    """A bit flipped at the beginning, in the middle, at the end; and None: no file at all."""
    places = {0, len(whole) // 2, len(whole) - 1} if whole else ()
    flipped = [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places]
    return [*flipped, None]
