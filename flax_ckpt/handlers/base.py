"""The vocabulary of checkpointables: what handlers, registries and paths in the making are.

class ListHandler:                                   # a handler needs no base class
    async def save(self, directory, checkpointable):
        snapshot = list(checkpointable)              # blocks the caller: keep it short
        return self._write(directory, snapshot)      # runs in the background

    async def _write(self, directory, snapshot):
        directory = await directory.await_creation()
        (directory / "items.txt").write_text(repr(snapshot))
    ...
"""

from __future__ import annotations

import os
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar, runtime_checkable

from etils import epath

# A part of a checkpoint that is loaded or left alone as a whole: params, the run's config, the
# data iterator. Its abstract form says how to load it. Any object may be one.
Checkpointable = Any
AbstractCheckpointable = Any

T = TypeVar("T")
AbstractT = TypeVar("AbstractT")


@runtime_checkable
class PathAwaitingCreation(Protocol):
    """A directory that is made in the background while handlers take their snapshots."""

    @property
    def path(self) -> epath.Path:
        """Where it will be."""
        ...

    @property
    def name(self) -> str:
        """Its last part."""
        ...

    def __truediv__(self, other: str | os.PathLike[str]) -> PathAwaitingCreation:
        """A path in it."""
        ...

    async def await_creation(self) -> epath.Path:
        """Waits until it is there; raises what kept it from being made."""
        ...


@runtime_checkable
class CheckpointableHandler(Protocol[T, AbstractT]):
    """How one kind of checkpointable is written to a directory of its own and read back.

    Saving and loading have two phases: what the coroutine does itself blocks the caller; the
    awaitable that it returns is the rest, run in the background. A handler is built without
    arguments, within the context of the save or load.
    """

    async def save(self, directory: PathAwaitingCreation, checkpointable: T) -> Awaitable[None]:
        """Takes the snapshot, and returns the writing of it.

        Args:
            directory: `name`, `path` and `/` work at once; before any file is touched the
                background part does `directory = await directory.await_creation()`.
            checkpointable: what to save; the caller may change it once this has returned.
        """
        ...

    async def load(
        self, directory: epath.Path, abstract_checkpointable: AbstractT | None = None
    ) -> Awaitable[T]:
        """Returns the reading of what is in `directory`, as `abstract_checkpointable` says."""
        ...

    async def metadata(self, directory: epath.Path) -> AbstractT | None:
        """The abstract form of what is in `directory`; cheap, in the caller's thread."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """Whether this handler can save the value."""
        ...

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Whether it can load into the abstract value; None: it cannot tell."""


@runtime_checkable
class StatefulCheckpointable(Protocol):
    """An object that saves itself, and loads its state into itself: a data iterator."""

    async def save(self, directory: PathAwaitingCreation) -> Awaitable[None]:
        """As :meth:`CheckpointableHandler.save`."""
        ...

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        """As :meth:`CheckpointableHandler.load`; changes the object."""
        ...


HandlerType = type[CheckpointableHandler[Any, Any]]
