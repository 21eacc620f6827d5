"""The handler of objects that keep a state of their own: data iterators.

fc.save_checkpointables("/ckpt/100", {"params": params, "data": iterator})
fc.load_checkpointables("/ckpt/100", {"data": iterator})     # changes it in place
"""

import os
from collections.abc import Awaitable
from typing import Any, ClassVar, Protocol, TypeAlias, final, runtime_checkable

from etils import epath

from flax_ckpt.errors import NotHandleableError, StateError
from flax_ckpt.format import names, position
from flax_ckpt.handlers.base import PathAwaitingCreation, StatefulCheckpointable
from flax_ckpt.storage import files, hosts
from flax_ckpt.storage.record import Record


@runtime_checkable
class HasState(Protocol):
    """An iterator that says where it is, and can be put there."""

    def get_state(self) -> Any:
        """Where it is; see :func:`flax_ckpt.format.position.encode` for what it may be of."""

    def set_state(self, state: Any) -> None:
        """Goes on from there."""


Stateful: TypeAlias = StatefulCheckpointable | HasState


@final
class StatefulHandler:
    """Passes on to an object's own `save` and `load`, else to its `get_state` and `set_state`.

    For the latter it writes one JSON file for each process, `process_<index>-of-<count>.json`.
    Grain's iterators have both, and write such files themselves.
    """

    TYPESTR: ClassVar = names.TYPE_STATEFUL

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: Stateful
    ) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`.

        Raises:
            NotHandleableError: the state is of something that JSON cannot hold.
        """
        if isinstance(checkpointable, StatefulCheckpointable):
            return await checkpointable.save(directory)
        what = f"a {type(checkpointable).__name__}"
        return self._write(directory, position.encode(checkpointable.get_state(), what))

    async def _write(self, directory: PathAwaitingCreation, data: bytes) -> None:
        files.write(os.fspath(await directory.await_creation() / file_name()), data)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: Stateful | None = None
    ) -> Awaitable[Stateful]:
        """See :class:`CheckpointableHandler`; the object given is changed and returned.

        Raises:
            NotHandleableError: no object is given.
            StateError: another number of processes saved it.
            FormatError: the file is not such a state.
        """
        target = abstract_checkpointable
        if target is None:
            name = directory.name
            what = f"checkpointable {name!r} loads its state into an object: give one, e.g."
            raise NotHandleableError(f"{what} load_checkpointables(path, {{{name!r}: iterator}})")
        _require_processes(os.fspath(directory))
        saves_itself = isinstance(target, StatefulCheckpointable)
        rest = await target.load(directory) if saves_itself else _read(os.fspath(directory), target)
        return self._load(rest, target)

    async def _load(self, rest: Awaitable[None], target: Stateful) -> Stateful:
        await rest
        return target

    async def metadata(self, directory: epath.Path) -> None:
        """None: only the object knows."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """True for objects with `save` and `load`, or with `get_state` and `set_state`."""
        return isinstance(checkpointable, Stateful)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Likewise."""
        return isinstance(abstract_checkpointable, Stateful)


async def _read(directory: str, target: HasState) -> None:
    data = Record(directory).read(file_name())
    target.set_state(position.decode(data, os.path.join(directory, file_name())))


def file_name() -> str:
    """The file of this process."""
    return names.position_file(hosts.process_index(), hosts.process_count())


def _require_processes(directory: str) -> None:
    """Checks that as many processes load as have saved, if files say how many that were."""
    files.refuse_link(directory)
    count = hosts.process_count()
    saved = {n for n in map(names.process_count_of, os.listdir(directory)) if n}
    if saved and count not in saved:
        what = f"{directory} has the positions of {max(saved)} process(es), and this run has"
        what += f" {count}: each of them has read a part of the data of its own, so that these do"
        how = "Resume with as many, or begin the data anew: restore_or_init(..., restart_data=True)"
        raise StateError(f"{what} not fit. {how}")
