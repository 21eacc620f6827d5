"""`save` and its kin: checkpointables into a directory that appears whole or not at all.

    fc.save("/ckpt/params", params)
    response = fc.save_checkpointables_async("/ckpt/100", {"params": params, "config": message})
    response.result()

The synchronous functions wait for the `result()` of what the asynchronous ones return.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import inspect
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from concurrent.futures import Future
from threading import Event, Lock
from typing import Any

from etils import epath

from flax_ckpt import _async
from flax_ckpt._async import AsyncResponse, parameters_of
from flax_ckpt.context import Context, applied, resolve
from flax_ckpt.errors import CheckpointExistsError, NotHandleableError
from flax_ckpt.format import checkpoint, jsons, names
from flax_ckpt.handlers import registry as handler_registry
from flax_ckpt.handlers.parts import Session
from flax_ckpt.handlers.pytree import PyTreeHandler
from flax_ckpt.handlers.registry import Handler
from flax_ckpt.storage import files, hosts
from flax_ckpt.storage.commit import DeferredPath, Staging


class _Turn:
    """The place of a save among those to one path, which come one after another."""

    before: _Turn | None = None

    def __init__(self) -> None:
        self.begun, self.ended = Event(), Event()

    def wait(self) -> None:
        """Waits for those before. One that was refused has ended, but not those before it."""
        before, self.before = self.before, None
        while before is not None:
            before.ended.wait()
            before = before.before


# Two saves to one path must not share a staging directory: the later waits for the earlier.
_in_flight: weakref.WeakValueDictionary[str, _Turn] = weakref.WeakValueDictionary()
_lock = Lock()
_async.forget_in_child(_lock, _in_flight.clear)


def save_async(
    path: files.PathLike,
    state: Any,
    *,
    checkpointable_name: str = names.STATE,
    overwrite: bool = False,
    custom_metadata: dict[str, Any] | None = None,
) -> AsyncResponse[None]:
    """Saves one PyTree in the background; arguments and errors as :func:`save`.

    When it returns, the arrays may be donated, deleted or overwritten, but for NumPy memory that a
    JAX array was made of without a copy: JAX counts on it. A failure of the rest is
    raised by `result()` of what is returned, or reported when the process ends.
    """
    tree = {checkpointable_name: state}
    return start(path, tree, resolve(), overwrite, custom_metadata, trees=tree)


@parameters_of(save_async)
def save(*args: Any, **named: Any) -> None:
    """Saves one PyTree.

    Args:
        path: the checkpoint's directory; its parents are made.
        state: any JAX PyTree of arrays, numbers, strings and None.
        checkpointable_name: the sub-directory for the tree.
        overwrite: whether a checkpoint at `path` is replaced; else it is an error.
        custom_metadata: anything JSON can hold, given back by :func:`metadata`.

    Raises:
        CheckpointExistsError: there is something at `path`.
        UnsupportedLeafError: lists every leaf that cannot be saved.
        DuplicateNameError: two leaves would share a name on disk.
        OSError: the file system refused; the target is as it was before.

    >>> import tempfile, numpy as np, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save(path, {"w": np.ones(3), "step": 7})
    >>> fc.load(path)
    {'step': 7, 'w': array([1., 1., 1.])}
    """
    save_async(*args, **named).result()


def save_checkpointables_async(
    path: files.PathLike,
    checkpointables: Mapping[str, Any],
    *,
    overwrite: bool = False,
    custom_metadata: dict[str, Any] | None = None,
) -> AsyncResponse[None]:
    """Saves several checkpointables in the background; see :func:`save_checkpointables`."""
    return start(path, checkpointables, resolve(), overwrite, custom_metadata)


@parameters_of(save_checkpointables_async)
def save_checkpointables(*args: Any, **named: Any) -> None:
    """Saves several checkpointables in one checkpoint, each in a sub-directory of its name.

    Args:
        path: the checkpoint's directory.
        checkpointables: values by name; each goes to the handler that accepts it.
        overwrite: whether a checkpoint at `path` is replaced.
        custom_metadata: anything JSON can hold.

    Raises:
        NoEntryError: no handler accepts a value.
        CheckpointExistsError, UnsupportedLeafError, DuplicateNameError, OSError: as :func:`save`.
    """
    save_checkpointables_async(*args, **named).result()


def start(
    path: files.PathLike,
    checkpointables: Mapping[str, Any],
    context: Context,
    overwrite: bool = False,
    custom_metadata: dict[str, Any] | None = None,
    *,
    trees: Collection[str] = (),
    internal: bool = False,
    session: Session | None = None,
    permit: Callable[[], None] | None = None,
    result: Any = None,
) -> AsyncResponse[Any]:
    """Begins a save within a context given explicitly.

    Args:
        path: the checkpoint's directory.
        checkpointables: values by name.
        context: options.
        overwrite: whether a checkpoint at `path` is replaced.
        custom_metadata: anything JSON can hold.
        trees: names of those that are trees, even if other handlers accept them.
        internal: whether reserved names are allowed.
        session: what this is a partial save of; None: it is a whole checkpoint.
        permit: called before the commit; what it raises ends the save without one.
        result: what the response will give.
    """
    target = files.local_path(path)
    if not isinstance(checkpointables, Mapping):  # type: ignore[redundant-expr]
        raise TypeError(f"checkpointables must be a dict of values by name: {checkpointables!r}")
    for name, value in checkpointables.items():
        _check(name, value, internal)
    if not checkpointables:
        raise ValueError("there is nothing to save: `checkpointables` is empty")
    custom = jsons.checked_metadata(custom_metadata) if custom_metadata else {}
    started = time.time_ns()
    place, turn, writing = os.path.realpath(target), _Turn(), list[Awaitable[None]]()
    after = None if session else context.asynchronous.post_finalization_callback
    try:
        with _lock:
            before = turn.before = _in_flight.get(place)
            if before is not None and not before.ended.is_set() and not (overwrite or session):
                text = f"{target} is being saved right now; save to another path"
                raise CheckpointExistsError(text)
            _in_flight[place] = turn
        with applied(context):
            mode = context.file.path_permission_mode
            staging = session or Staging(target, overwrite=overwrite, mode=mode)
            together = hosts.current(context.multiprocessing, context.asynchronous, target)
            registry = context.checkpointables.registry or handler_registry.global_registry()
            part = PyTreeHandler(partial_save_mode=True) if session else None
            handlers = {
                name: part or handler_registry.for_save(registry, name, value, tree=name in trees)
                for name, value in checkpointables.items()
            }
            types = {name: handler_registry.typestr(type(h)) for name, h in handlers.items()}
            root = checkpoint.RootMetadata(types, started, custom_metadata=custom)
            work = _Save(target, staging, together, root, writing)
            _async.run(work.take(handlers, checkpointables))
            run, what = lambda: work.finish(turn, permit) or result, f"checkpoint {target}"
            return AsyncResponse(run, what, then=after, begun=turn.begun)
    except BaseException:
        if not turn.begun.is_set():  # else an interrupt came while the thread goes on
            with _lock:
                if turn.before is not None and _in_flight.get(place) is turn:
                    _in_flight[place] = turn.before
            turn.ended.set()
            _close(writing)
        raise


def _check(name: Any, value: Any, internal: bool) -> None:
    if name in names.RESERVED and not internal:
        raise ValueError(f"{name!r} is a reserved name; call the checkpointable something else")
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in "..":
        raise ValueError(f"a checkpointable's name must be a directory name, got {name!r}")
    if names.TMP_SUFFIX in name or name in (*names.MARKS, names.COMMIT_SUCCESS):
        raise ValueError(f"the name {name!r} is that of a file of the format; take another one")
    if value is None:
        raise ValueError(f"checkpointable {name!r} is None: leave it out instead")


@dataclasses.dataclass
class _Save:
    """One save: `take` takes the snapshots, `finish` does the rest."""

    target: str
    staging: Staging
    together: hosts.Hosts
    root: checkpoint.RootMetadata
    writing: list[Awaitable[None]]
    created: Future[None] = dataclasses.field(default_factory=Future[None])

    async def take(self, handlers: Mapping[str, Handler], values: Mapping[str, Any]) -> None:
        root = DeferredPath(epath.Path(self.staging.path), self.created)
        for name, handler in handlers.items():
            rest = await handler.save(root / name, values[name])
            if not inspect.isawaitable(rest):
                what = f"checkpointable {name!r}: {type(handler).__name__}.save returned {rest!r}"
                raise NotHandleableError(f"{what}, not an awaitable that writes it")
            self.writing.append(rest)

    def finish(self, turn: _Turn, permit: Callable[[], None] | None) -> None:
        """Writes, syncs and commits; on failure the target is what it was.

        Args:
            turn: waits for the saves to the same path that came before; ended here.
            permit: called before the commit; raises if there is to be none.
        """
        turn.wait()
        try:
            _async.run(self._write())
            self.together.barrier("written")
            if self.together.is_primary:
                root = dataclasses.replace(self.root, commit_timestamp_nsecs=time.time_ns())
                write_root(self.staging.path, root, self.target)
            self.staging.sync()
            self.together.barrier("synced")
            if permit is not None:
                permit()
            if self.together.is_primary:
                self.staging.commit()
            self.together.barrier("committed")
        except BaseException as error:
            error.add_note(f"while saving the checkpoint {self.target}")
            if self.together.is_primary:
                self.staging.discard()
            raise
        finally:
            turn.ended.set()

    async def _write(self) -> None:
        try:
            if self.together.is_primary:
                self.staging.create(self.root.item_handlers)
            self.together.barrier("created")
        except BaseException as error:
            self.created.set_exception(error)
            _close(self.writing)
            raise
        self.created.set_result(None)
        for result in await asyncio.gather(*self.writing, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result


def _close(writing: list[Awaitable[None]]) -> None:
    for rest in writing:
        if isinstance(rest, Coroutine):
            rest.close()


def write_root(root: str, metadata: checkpoint.RootMetadata, target: str) -> None:
    """Writes the files at the root of a checkpoint, when all others are written.

    Args:
        root: the staging directory.
        metadata: what the checkpoint says of itself.
        target: the path that it will have.
    """
    committed = f"Checkpoint committed to {target}\n".encode()
    files.write(os.path.join(root, names.INDICATOR), b"")
    files.write(os.path.join(root, names.CHECKPOINT_METADATA), metadata.to_bytes())
    files.write(os.path.join(root, names.COMMIT_SUCCESS), committed)
    paths = [p for p in files.walk(root) if p != names.OWNER and not _is_array_data(root, p)]
    crcs = {p: checkpoint.file_crc(b"", files.blocks(os.path.join(root, p))) for p in paths}
    writers = {package: version(package) for package in ("flax-ckpt", "jax", "numpy")}
    files.write(os.path.join(root, names.INTEGRITY), checkpoint.Integrity(crcs, writers).to_bytes())


def _is_array_data(root: str, path: str) -> bool:
    """Whether the chunk table vouches for a file: data files of our own PyTree directories."""
    item, *inner = path.split("/")
    in_data = len(inner) > 1 and inner[-2] == names.DATA_DIR
    return in_data and os.path.isfile(os.path.join(root, item, names.CHUNK_TABLE))


@functools.cache
def version(package: str) -> str:
    """The version of an installed package; "unknown" of one that is on the path alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
