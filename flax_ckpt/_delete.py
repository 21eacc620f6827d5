"""`delete`: a checkpoint, or one of its checkpointables, and nothing else.

fc.delete("/ckpt/100")
fc.delete("/ckpt/200", checkpointable_name="opt_state")
"""

import os
from typing import Any

from flax_ckpt._async import AsyncResponse, parameters_of
from flax_ckpt.context import resolve
from flax_ckpt.errors import CheckpointableNotFoundError, DeletionRecoveryError, InvalidLayoutError
from flax_ckpt.format import jsons, names
from flax_ckpt.format.checkpoint import DeletionRecord
from flax_ckpt.storage import commit, deletion, files, hosts, kinds
from flax_ckpt.storage.record import Record


def delete_async(
    path: files.PathLike, *, checkpointable_name: str | None = None, missing_ok: bool = False
) -> AsyncResponse[bool]:
    """Deletes in the background; arguments and errors as :func:`delete`.

    What can be refused is refused at once; when it returns, a checkpointable is hidden already.
    """
    target, name, context = files.local_path(path), checkpointable_name, resolve()
    together = hosts.current(context.multiprocessing, context.asynchronous, f"{target} delete")
    there = _is_there(target, name, missing_ok)
    record = _record(target, name) if there and name is not None else None
    together.barrier("looked")
    if together.is_primary and record and not deletion.read(target):
        deletion.begin(target, record)
    together.barrier("published")

    def work() -> bool:
        if together.is_primary and record is not None:
            deletion.finish(target, record)
        elif together.is_primary and there:
            commit.remove(target)
        together.barrier("deleted")
        return there

    return AsyncResponse(work, f"checkpoint {target}", verb="deleted")


@parameters_of(delete_async)
def delete(*args: Any, **named: Any) -> bool:
    """Deletes a checkpoint, or one of its checkpointables.

    A whole checkpoint leaves its name before its first byte goes. While one checkpointable goes,
    and if that is interrupted, the others can be loaded; it cannot. The same call again finishes
    an interrupted deletion. All processes call it.

    Args:
        path: one checkpoint, not the root of a run. What bears no mark of a checkpoint is never
            deleted.
        checkpointable_name: which of its checkpointables; None: the whole checkpoint.
        missing_ok: whether it is no error that there is nothing to delete.

    Returns:
        Whether something was deleted.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CheckpointableNotFoundError: it has no such checkpointable.
        InvalidLayoutError: it is something else; says what.
        ValueError: the name cannot be one, or is that of the only checkpointable.
        DeletionRecoveryError: the deletion of another one was interrupted.

    >>> import tempfile, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save_checkpointables(path, {"params": {"w": 1}, "opt_state": {"m": 2}})
    >>> fc.delete(path, checkpointable_name="opt_state")
    True
    >>> fc.load_checkpointables(path)
    {'params': {'w': 1}}
    >>> fc.delete(path), fc.delete(path, missing_ok=True)
    (True, False)
    """
    return delete_async(*args, **named).result()


def _is_there(target: str, name: str | None, missing_ok: bool) -> bool:
    """Whether there is something to delete; raises if it is something else."""
    refused = (".", "..", *names.RESERVED, *names.MARKS)
    if name is not None and (name in refused or name != os.path.basename(name)):
        raise ValueError(f"{name!r} is not the name of a checkpointable that can be deleted")
    if not os.path.lexists(target):
        if name is None and os.path.lexists(commit.removed_path(target)):
            return True  # an interrupted deletion
        if missing_ok:
            return False
        raise kinds.not_there(target)
    kinds.require_directory(target)
    if os.path.islink(target):
        real = os.path.realpath(target)
        raise InvalidLayoutError(f"{target} is a link; delete what it leads to: {real}")
    marked = names.MARKS.intersection(os.listdir(target))
    if not marked or kinds.owner(target) or kinds.unfinished(target):
        raise InvalidLayoutError(f"{target} {kinds.describe(target)}. Nothing was deleted")
    if name is None or deletion.read(target) or os.path.lexists(os.path.join(target, name)):
        return True
    if missing_ok:
        return False
    there = ", ".join(_items(target, _metadata(target)))
    raise CheckpointableNotFoundError(f"{target} has no checkpointable {name!r}; it has: {there}")


def _record(target: str, name: str) -> DeletionRecord:
    """What is to be published, or was already by a deletion that was interrupted."""
    if (pending := deletion.read(target)) is not None:
        if pending.checkpointable_name == name and pending.destination is None:
            return pending
        how = "with Orbax" if pending.destination else "with the same call"
        what = f"the deletion of the checkpointable {pending.checkpointable_name!r} of {target}"
        raise DeletionRecoveryError(f"{what} was interrupted: finish it first, {how}")
    metadata = _metadata(target)
    items = _items(target, metadata)
    if name not in items or os.path.islink(os.path.join(target, name)):
        what = f"{os.path.join(target, name)} is no checkpointable of {target}, which has"
        there = ", ".join(items) or "none, being one PyTree"
        raise InvalidLayoutError(f"{what}: {there}. Nothing was deleted")
    if items == [name]:
        what = f"{name!r} is the only checkpointable of {target}; delete the whole checkpoint"
        raise ValueError(f"{what}: flax_ckpt.delete({target!r})")
    return DeletionRecord.of(metadata, name)


def _metadata(target: str) -> dict[str, Any]:
    data = deletion.read_metadata(Record(target))
    where = os.path.join(target, names.CHECKPOINT_METADATA)
    return {} if data is None else jsons.parse_object(data, where)


def _items(target: str, metadata: dict[str, Any]) -> list[str]:
    """The checkpointables that `_CHECKPOINT_METADATA` names and that are there."""
    handlers = metadata.get("item_handlers")
    found = handlers.keys() - names.RESERVED if jsons.is_object(handlers) else ()
    return sorted(name for name in found if os.path.isdir(os.path.join(target, name)))
