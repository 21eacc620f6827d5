"""The handler of objects that save and load themselves."""

from collections.abc import Awaitable
from typing import Any, ClassVar, final

from etils import epath

from flax_ckpt.errors import NotHandleableError
from flax_ckpt.format import names
from flax_ckpt.handlers.base import PathAwaitingCreation, StatefulCheckpointable


@final
class StatefulHandler:
    """Passes on to the `save` and `load` of a :class:`StatefulCheckpointable`."""

    TYPESTR: ClassVar = names.TYPE_STATEFUL

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: StatefulCheckpointable
    ) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`."""
        return await checkpointable.save(directory)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: StatefulCheckpointable | None = None
    ) -> Awaitable[StatefulCheckpointable]:
        """See :class:`CheckpointableHandler`; the object given is changed and returned.

        Raises:
            NotHandleableError: no object is given.
        """
        if abstract_checkpointable is None:
            raise NotHandleableError(
                f"checkpointable {directory.name!r} loads its state into an object: give one, e.g."
                f" load_checkpointables(path, {{{directory.name!r}: iterator}})"
            )
        return self._load(await abstract_checkpointable.load(directory), abstract_checkpointable)

    async def _load(
        self, rest: Awaitable[None], target: StatefulCheckpointable
    ) -> StatefulCheckpointable:
        await rest
        return target

    async def metadata(self, directory: epath.Path) -> None:
        """None: only the object knows."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """True for objects with `save` and `load`."""
        return isinstance(checkpointable, StatefulCheckpointable)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Likewise."""
        return isinstance(abstract_checkpointable, StatefulCheckpointable)
