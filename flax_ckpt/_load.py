"""`load` and its kin: checkpointables from a directory, and what is in it without loading.

params = fc.load("/ckpt/params", abstract_params)
parts = fc.load_checkpointables("/ckpt/100", {"params": abstract_params, "config": None})
fc.metadata("/ckpt/params").metadata["w"].shape
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from etils import epath

from flax_ckpt import _async, errors
from flax_ckpt._async import AsyncResponse, logger, parameters_of
from flax_ckpt._metadata import CheckpointMetadata
from flax_ckpt.context import Context, applied, resolve
from flax_ckpt.format import checkpoint, names
from flax_ckpt.handlers import registry as handler_registry
from flax_ckpt.handlers.pytree import PyTreeHandler
from flax_ckpt.handlers.text import TextHandler
from flax_ckpt.leaves.base import PLACEHOLDER
from flax_ckpt.storage import deletion, files, kinds
from flax_ckpt.storage.files import PathLike, local_path
from flax_ckpt.storage.record import Damage, OnDamage, Record, notes, noting, warn

T = TypeVar("T")
_jax: Any = jax  # which says nothing about the types of its trees


def load(
    path: PathLike,
    abstract_state: Any = None,
    *,
    checkpointable_name: str | None = names.AUTO,
    on_damage: OnDamage = "raise",
) -> Any:
    """Loads one PyTree.

    Args:
        path: the checkpoint.
        abstract_state: a tree of abstract leaves, such as `jax.eval_shape` returns, or a
            :class:`CheckpointMetadata`; None: as it was saved, in dicts and lists. A dtype named
            there is a cast. A leaf without a sharding comes back with the saved one if its
            devices are here, else on one device. A leaf that is :data:`PLACEHOLDER`, `...`, is
            not read and stays so, also where the checkpoint has nothing.
        checkpointable_name: which checkpointable; `AUTO`: `state`, or the only tree there is;
            None: `path` is itself the directory of the tree.
        on_damage: "skip": a leaf that is damaged comes back as `PLACEHOLDER`, the others as they
            are, and one WARNING lists each with the reason. Damage to what describes the tree, its
            index or the checkpoint itself raises in any case: nothing could be told from it. Of
            several processes each skips what is damaged of its own part.

    Returns:
        A tree of the structure of `abstract_state`.

    Raises:
        CheckpointNotFoundError: nothing at `path`.
        CheckpointableNotFoundError: no such checkpointable.
        InvalidLayoutError: not a checkpoint, or several trees and none is called `state`.
        TreeMismatchError: lists every difference; nothing was read.
        DamagedCheckpointError: bytes are not those that were saved.

    >>> import tempfile, jax, numpy as np, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save(path, {"w": np.ones(3, np.float32)})
    >>> fc.load(path, {"w": jax.ShapeDtypeStruct((3,), np.float32)})
    {'w': Array([1., 1., 1.], dtype=float32)}
    >>> fc.load(path, {"w": fc.PLACEHOLDER})
    {'w': Ellipsis}
    """
    abstract = _unwrapped(abstract_state)

    def read() -> Any:
        layout = Layout.of(path)
        name = layout.tree_name(checkpointable_name)
        return _async.run(_load(layout, {name: abstract}, on_damage))[name]

    return steadily(path, read)


@parameters_of(load)
def load_async(*args: Any, **named: Any) -> AsyncResponse[Any]:
    """Loads one PyTree in the background; see :func:`load`."""
    return _in_background(load, *args, **named)


def load_checkpointables(
    path: PathLike,
    abstract_checkpointables: Mapping[str, Any] | CheckpointMetadata[Any] | None = None,
    *,
    on_damage: OnDamage = "raise",
) -> dict[str, Any]:
    """Loads several checkpointables of a checkpoint.

    Args:
        path: the checkpoint.
        abstract_checkpointables: the wanted ones by name, each with its abstract form, or None to
            load it as it was saved. Those not named are left alone. None: all.
        on_damage: as in :func:`load`; one that is no PyTree is like one leaf.

    Returns:
        The values by name.

    Raises:
        CheckpointNotFoundError: nothing at `path`.
        CheckpointableNotFoundError: a name that is not there.
        NoEntryError: no handler for a checkpointable is registered here.
        InvalidLayoutError, TreeMismatchError, DamagedCheckpointError: as :func:`load`.
    """
    context, wanted = resolve(), abstract_checkpointables
    return steadily(path, lambda: load_layout(Layout.of(path), wanted, context, on_damage))


@parameters_of(load_checkpointables)
def load_checkpointables_async(*args: Any, **named: Any) -> AsyncResponse[dict[str, Any]]:
    """Loads several checkpointables in the background; see :func:`load_checkpointables`."""
    return _in_background(load_checkpointables, *args, **named)


def _in_background(read: Callable[..., T], *args: Any, **named: Any) -> AsyncResponse[T]:
    given = inspect.signature(read).bind(*args, **named).arguments
    given["path"] = here = local_path(given["path"])
    # Its containers anew: the caller may change his tree.
    leaves, treedef = _jax.tree.flatten({name: _unwrapped(v) for name, v in given.items()})
    wanted = treedef.unflatten(leaves)
    work = _async.with_settings(lambda: read(**wanted))
    return AsyncResponse(work, f"load of {here}", reported=False)


def metadata(
    path: PathLike, checkpointable_name: str | None = names.AUTO
) -> CheckpointMetadata[Any]:
    """What a saved PyTree looks like, without its data.

    Args:
        path: the checkpoint.
        checkpointable_name: as in :func:`load`.

    Returns:
        Its `metadata` is the tree in dicts and lists, with `jax.ShapeDtypeStruct` for JAX arrays,
        a `NumpyShapeDtype`, shape and dtype, for NumPy arrays, 0, 0.0 or False for numbers.

    >>> import tempfile, numpy as np, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save(path, {"w": np.ones(3)}, custom_metadata={"run": 1})
    >>> m = fc.metadata(path)
    >>> m.metadata, m.custom_metadata
    ({'w': NumpyShapeDtype(shape=(3,), dtype=dtype('float64'))}, {'run': 1})
    """

    def read() -> CheckpointMetadata[Any]:
        layout = Layout.of(path)
        name = layout.tree_name(checkpointable_name)
        return layout.wrap(_async.run(_describe(layout, {name: _handler(layout, name)}))[name])

    return steadily(path, read)


def checkpointables_metadata(path: PathLike) -> CheckpointMetadata[dict[str, Any]]:
    """What all checkpointables of a checkpoint look like; see :func:`metadata`.

    One for which no handler is registered here is None.
    """

    def read() -> CheckpointMetadata[dict[str, Any]]:
        layout, handlers = Layout.of(path), dict[str, Any]()
        every = dict.fromkeys(name for name in layout.items if name != names.METRICS)
        for name in every:
            with contextlib.suppress(errors.NoEntryError):
                handlers[name] = _handler(layout, name)
        return layout.wrap(every | _async.run(_describe(layout, handlers)))

    return steadily(path, read)


def is_orbax_checkpoint(path: PathLike) -> bool:
    """Whether there is a finished checkpoint at a path, of this package or of Orbax.

    Not the root of a run, not a checkpointable of a checkpoint, nothing unfinished. Orbax's own
    function also says yes to any other directory.

    >>> import tempfile, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save(path, {"w": 1})
    >>> fc.is_orbax_checkpoint(path), fc.is_orbax_checkpoint(path + "/state")
    (True, False)
    """
    return kinds.is_checkpoint(local_path(path))


def steadily(path: PathLike, read: Callable[[], T]) -> T:
    """What `read` returns, tried again as long as the checkpoint is replaced under its hands.

    Also if it finds nothing wrong: of a checkpoint that is being deleted it may see but a part. Not
    for ever: there are file systems that give a file another number each time.
    """
    for is_last in (*[False] * 99, True):
        before = identity(path)
        try:
            found = read()
        except (errors.FlaxCkptError, FileNotFoundError):
            if is_last or identity(path) == before:
                raise
        else:
            if is_last or identity(path) == before:
                return found
    raise AssertionError("one is the last")


def identity(path: PathLike) -> tuple[int, int] | None:
    """What a directory that takes another's place has of its own; numbers alone are given again."""
    with contextlib.suppress(OSError):  # it may go at any moment
        found = os.stat(local_path(path))
        return found.st_ino, found.st_ctime_ns
    return None


def load_layout(
    layout: Layout, abstract: Any, context: Context, on_damage: OnDamage = "raise"
) -> dict[str, Any]:
    """As :func:`load_checkpointables`, of a layout and in a context given explicitly."""
    wanted = _unwrapped(abstract)
    if layout.is_flat:
        what = f"{layout.path} is one PyTree without checkpointables"
        raise errors.InvalidLayoutError(f"{what}: use flax_ckpt.load")
    if wanted is None:
        if layout.deleting:
            text = "%s: the checkpointable %r is left out, as its deletion was not finished"
            logger.warning(text, layout.path, layout.deleting)
        wanted = {name: None for name in layout.items if name != names.METRICS}
    with applied(context):
        return _async.run(_load(layout, wanted, on_damage))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A checkpoint's directory, recognised.

    Attributes:
        path: absolute.
        items: directory of each checkpointable; for a flat one the single key is "".
        root: `_CHECKPOINT_METADATA`.
        deleting: a checkpointable whose deletion was not finished; not among the items.
    """

    path: str
    items: Mapping[str, str]
    root: checkpoint.RootMetadata
    deleting: str | None = None

    @classmethod
    def of(cls, path: PathLike) -> Layout:
        """Recognises what is at a path.

        Raises:
            CheckpointNotFoundError: nothing.
            InvalidLayoutError: no finished checkpoint.
        """
        here = local_path(path)
        kinds.require_directory(here)
        if kinds.unfinished(here):
            raise errors.InvalidLayoutError(f"{here} {kinds.describe(here)}")
        record = Record(here)
        data = deletion.read_metadata(record)
        where = os.path.join(here, names.CHECKPOINT_METADATA)
        root = checkpoint.RootMetadata.from_bytes(data or b"", where)
        if kinds.holds_tree(here):
            _refuse_deleted(*os.path.split(here), _being_deleted(os.path.dirname(here)))
            return cls(here, {"": here}, root)
        found = {entry.name: entry.path for entry in os.scandir(here) if kinds.is_item(entry)}
        if data is None and not any(map(kinds.is_item_tree, found.values())):
            raise errors.InvalidLayoutError(f"{here} {kinds.describe(here)}")
        found |= {n: os.path.join(here, n) for n in root.item_handlers if record.listed(f"{n}/")}
        deleting = _being_deleted(here)
        found.pop(deleting or "", None)
        ours = any(os.path.lexists(os.path.join(p, names.CHUNK_TABLE)) for p in found.values())
        if ours and not record.native:
            text = "%s: %s is missing: of its files only the data of arrays can be checked"
            logger.warning(text, here, names.INTEGRITY)
        return cls(here, dict(sorted(found.items())), root, deleting)

    @property
    def trees(self) -> list[str]:
        """The checkpointables that are PyTrees."""
        return [n for n, path in self.items.items() if Record(path).lists(names.TREE_METADATA)]

    @property
    def is_flat(self) -> bool:
        """Whether the directory is itself a PyTree, as v0's `PyTreeCheckpointer` makes it."""
        return "" in self.items

    def tree_name(self, wanted: str | None) -> str:
        """The checkpointable that holds the tree to load."""
        if wanted is None or self.is_flat:
            if not (self.is_flat and wanted in (None, names.AUTO)):
                what = f"{self.path} {'is' if self.is_flat else 'is not'} itself a PyTree, but"
                what += f" checkpointable_name={wanted!r} was asked for; it has"
                raise errors.InvalidLayoutError(f"{what}: {', '.join(self.items) or 'nothing'}")
            return ""
        if wanted != names.AUTO:
            return wanted
        trees = self.trees
        for name in [*names.LEGACY_STATES, *(trees if len(trees) == 1 else [])]:
            if name in trees:
                return name
        what = f"{self.path} has {'several PyTrees' if trees else 'no PyTree'}"
        hint = "Name one with checkpointable_name=, or use flax_ckpt.load_checkpointables"
        there = ", ".join(trees or self.items) or "it is empty"
        raise errors.InvalidLayoutError(f"{what}: {there}. {hint}")

    def item(self, name: str) -> epath.Path:
        """The directory of a checkpointable.

        Raises:
            CheckpointableNotFoundError: there is none of that name.
            DeletionInProgressError: it is being deleted.
        """
        _refuse_deleted(self.path, name, self.deleting)
        if name not in self.items:
            what = f"{self.path} has no checkpointable {name!r}"
            raise errors.CheckpointableNotFoundError(f"{what}; it has: {', '.join(self.items)}")
        return epath.Path(self.items[name])

    def wrap(self, found: Any) -> CheckpointMetadata[Any]:
        """Metadata of this checkpoint around `found`."""
        path, said = resolve().file.path_class(self.path), dict(vars(self.root))
        del said["item_handlers"]
        return CheckpointMetadata(path, metadata=found, **said)


def _being_deleted(path: str) -> str | None:
    record = deletion.read(path)
    return record.checkpointable_name if record else None


def _refuse_deleted(path: str, name: str, deleting: str | None) -> None:
    if name == deleting:
        what = f"the checkpointable {name!r} of {path} is being deleted: its deletion has begun"
        call = f"flax_ckpt.delete({path!r}, checkpointable_name={name!r})"
        raise errors.DeletionInProgressError(f"{what} and not ended. {call} finishes it")


def _unwrapped(abstract: Any) -> Any:
    given: Any = abstract
    return given.metadata if isinstance(abstract, CheckpointMetadata) else abstract


def _handler(layout: Layout, name: str, abstract: Any = None) -> Any:
    registry = resolve().checkpointables.registry or handler_registry.global_registry()
    is_tree = kinds.holds_tree(os.fspath(layout.item(name)))
    types = layout.root.item_handlers
    recorded = types if isinstance(types, str) else types.get(name)
    return handler_registry.for_load(registry, name, abstract, recorded, is_tree)


async def _load(layout: Layout, wanted: Mapping[str, Any], on_damage: OnDamage) -> dict[str, Any]:
    damage = notes(on_damage)
    handlers = {name: _handler(layout, name, abstract) for name, abstract in wanted.items()}
    for name, handler in handlers.items():
        if isinstance(handler, PyTreeHandler):
            handler.damage = notes(on_damage)
        else:  # one that reads part of a tree checks that
            with noting(damage, name):
                most = files.MAX_BYTES if isinstance(handler, TextHandler) else math.inf
                Record(os.fspath(layout.item(name))).check_all(most)
    found: dict[str, Any] = dict.fromkeys(damage or (), PLACEHOLDER)
    for name, handler in handlers.items():
        if name not in found:
            found[name] = await (await handler.load(layout.item(name), wanted[name]))
        if damage is not None and isinstance(handler, PyTreeHandler):
            inside: Damage = handler.damage or {}
            damage |= {os.path.join(name, path): why for path, why in inside.items()}
    warn(layout.path, damage)
    return {name: found[name] for name in wanted}


async def _describe(layout: Layout, handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: await h.metadata(layout.item(name)) for name, h in handlers.items()}
