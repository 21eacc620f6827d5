"""A checkpoint whose leaves are saved in several calls; it appears when they are finalized.

    fc.partial.save("/ckpt/params", {"encoder": encoder})
    fc.partial.save("/ckpt/params", {"decoder": decoder})
    fc.partial.finalize("/ckpt/params")

Until then the leaves are safe in a directory beside it, also from one process to the next.
"""

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

from flax_ckpt import _save
from flax_ckpt._async import AsyncResponse
from flax_ckpt.context import resolve
from flax_ckpt.errors import CheckpointNotFoundError
from flax_ckpt.format import checkpoint, jsons, names
from flax_ckpt.handlers.parts import Session, merge
from flax_ckpt.storage import hosts
from flax_ckpt.storage.files import PathLike, local_path
from flax_ckpt.storage.record import Record

__all__ = ["finalize", "save", "save_async"]


_responses: dict[str, list[AsyncResponse[None]]] = {}  # by target: those finalize waits for


def save(path: PathLike, state: Any, *, custom_metadata: dict[str, Any] | None = None) -> None:
    """Saves some leaves of a checkpoint that :func:`finalize` completes.

    Nested dicts of several calls merge. A call is durable when it returns; one that fails, or a
    process that is killed, leaves what was saved before as it was, and the next call goes on.

    Args:
        path: where the checkpoint will be.
        state: a tree of leaves that were not saved yet.
        custom_metadata: merged with that of earlier calls; where both have a value, this wins.

    Raises:
        CheckpointExistsError: there is a finished checkpoint at `path`.
        DuplicateNameError: lists the leaves that are saved already; nothing was added.
        InvalidLayoutError: Orbax has begun a partial save there.
        UnsupportedLeafError, OSError: as :func:`flax_ckpt.save`.

    >>> import tempfile, numpy as np, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.partial.save(path, {"params": {"w": np.ones(2)}})
    >>> fc.partial.save(path, {"params": {"b": np.zeros(2)}, "step": 7})
    >>> fc.partial.finalize(path)
    >>> fc.load(path)
    {'params': {'b': array([0., 0.]), 'w': array([1., 1.])}, 'step': 7}
    """
    save_async(path, state, custom_metadata=custom_metadata).result()


def save_async(
    path: PathLike, state: Any, *, custom_metadata: dict[str, Any] | None = None
) -> AsyncResponse[None]:
    """Saves some leaves in the background; arguments and errors as :func:`save`.

    Calls for one path run one after another, and :func:`finalize` waits for them.
    """
    context, target = resolve(), local_path(path)
    session = Session(target, context.file.path_permission_mode)
    session.check()
    tree = {names.STATE: state}
    response = _save.start(target, tree, context, custom_metadata=custom_metadata, session=session)
    unknown = [r for r in _responses.get(target, []) if not (r.told or r.completed)]
    _responses[target] = [*unknown, response]
    return response


def finalize(path: PathLike) -> None:
    """Makes the checkpoint of all that was saved with :func:`save`, in one step.

    Array data is not copied. If this fails, the parts are as they were: call it again.

    Args:
        path: where the checkpoint will be.

    Raises:
        CheckpointExistsError: there is a finished checkpoint at `path`.
        CheckpointNotFoundError: nothing was saved for it.
        InvalidLayoutError: Orbax has begun the partial save.
        FormatError: the parts make no tree: an element of a list is missing.
        OSError: the file system refused, for instance to make hard links.
    """
    target = local_path(path).removesuffix(names.SESSION_SUFFIX)
    # What Orbax has begun is there, a checkpoint to be finalized is not.
    target = target.removesuffix(names.PARTIAL_SUFFIX) if os.path.isdir(target) else target
    pending = _responses.pop(target, [])
    for response in pending:
        response.ended.wait()
    for response in [response for response in pending if not response.told]:
        response.result()
    context = resolve()
    session = Session(target, context.file.path_permission_mode)
    together = hosts.current(context.multiprocessing, context.asynchronous, f"{target} finalize")
    together.barrier("called")
    if together.is_primary:
        session.recover()
    together.barrier("opened")
    session.check()
    if not (parts := session.parts()):
        why = "has no finished part" if os.path.isdir(session.directory) else "does not exist"
        what = f"{target} has no partial save to finalize: {session.directory} {why}"
        raise CheckpointNotFoundError(f"{what}; call flax_ckpt.partial.save first")
    together.barrier("looked")
    if together.is_primary:
        session.finalize(lambda root: _put_together(root, parts, target))
    together.barrier("committed")
    if context.asynchronous.post_finalization_callback is not None:
        context.asynchronous.post_finalization_callback()


def _put_together(root: str, parts: Sequence[str], target: str) -> None:
    trees = [os.path.join(part, names.STATE) for part in parts]
    merge(os.path.join(root, names.STATE), trees, target)
    read = [Record(part).read(names.CHECKPOINT_METADATA) for part in parts]
    saved = [checkpoint.RootMetadata.from_bytes(data, target) for data in read]
    started = min(metadata.init_timestamp_nsecs or 0 for metadata in saved)
    custom = functools.reduce(_merged, [metadata.custom_metadata for metadata in saved])
    types = {names.STATE: names.TYPE_PYTREE}
    metadata = checkpoint.RootMetadata(types, started, time.time_ns(), custom)
    _save.write_root(root, metadata, target)


def _merged(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged; where both have a value, that of `then`."""
    both = first.keys() & then.keys()
    nested = {key for key in both if jsons.is_object(first[key]) and jsons.is_object(then[key])}
    return first | then | {key: _merged(first[key], then[key]) for key in nested}
