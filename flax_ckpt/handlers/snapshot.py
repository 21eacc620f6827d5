"""A tree as it will be written: host memory, and the contents of the files beside it.

Taking it is all of a save that blocks the caller. On CPU a JAX array is referenced, not copied,
so the snapshot is good for as long as it is held, whatever becomes of the array.
"""

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax.core import Tracer

from flax_ckpt.context import Context
from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.array import ArrayLeaf, Held, sharding_text
from flax_ckpt.leaves.base import LeafWrite, show_array
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.options import ArrayOptions
from flax_ckpt.storage import native_write
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite

StorageOptions = ArrayOptions.Saving.StorageOptions
_PLAIN = StorageOptions()
_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees


class _Leaf(msgspec.Struct, frozen=True, gc=False):
    """One leaf that is no empty node, and the storage options of its own."""

    path: tree.KeyPath
    name: str
    held: LeafWrite | Held
    own: StorageOptions | None


class Snapshot:
    """What a save writes of one tree.

    Args:
        name: of the checkpointable, for error messages.
        value: the tree.
        registry: handlers of its leaves.
        context: options.

    Attributes:
        layout: where the arrays go, and how they are encoded.

    Raises:
        UnsupportedLeafError: lists every leaf that cannot be saved.
        DuplicateNameError: lists the leaves that would share a name on disk.
    """

    def __init__(self, name: str, value: Any, registry: LeafRegistry, context: Context) -> None:
        paths, leaves = keypaths.flatten(value)
        if jax.default_backend() != "cpu":
            _start_transfers(leaves)
        copies, saving = context.memory.deepcopy_host_arrays, context.array.saving
        encoding = arrays.Encoding(saving.use_zarr3, saving.use_compression)
        size = saving.ocdbt_target_data_file_size or 0
        self.layout = ArrayLayout(saving.use_ocdbt, encoding, size)
        self._general = copy.copy(saving.storage_options)  # the caller may change his
        create = saving.scoped_storage_options_creator
        owns = _own_options(value, create) if create else itertools.repeat(None)
        self._empty: list[tree.Entry] = []
        self._leaves: list[_Leaf] = []
        strings: dict[str, str] = {}
        refused: list[str] = []
        found = [tree.name_of(path) for path in paths]
        joined, depth = "\n".join(found), max(map(len, paths), default=0)
        plain = joined.isascii() and "/" not in joined and depth <= tree.MAX_DEPTH
        for path, on_disk, leaf in zip(paths, found, leaves, strict=True):
            handler = registry.for_value(leaf)
            if handler is None and keypaths.is_empty(leaf):
                self._empty.append(tree.Entry.of(path, keypaths.empty_kind(leaf)))
                continue
            own = next(owns)
            reason = "" if plain else _unstorable(path, on_disk)
            try:
                if handler is not None and not reason:
                    if isinstance(handler, ArrayLeaf):
                        held = handler.hold(leaf)
                    else:
                        held = handler.write(leaf, copy=copies)
                        if held.string is not None:
                            strings[on_disk] = held.string
                    self._leaves.append(_Leaf(path, on_disk, held, own))
                    continue
            except Exception:  # JAX raises several types for an array without a value
                if not (reason := _no_value(leaf)):
                    raise
            refused.append(f"  {tree.show(path)}: {reason or _describe(leaf)}")
        if refused:
            raise _cannot_be_saved(name, refused, len(leaves))
        # Checked and encoded now: a key that cannot be stored must be an error of the call, not of
        # its thread, and so must a dtype. The rest can wait until training has gone on.
        if not plain or len(set(found)) < len(found):
            stored = [arrays.prefix(leaf.name) for leaf in self._leaves]
            tree.unique_names([leaf.path for leaf in self._leaves], stored)
        self._strings = {names.STRINGS: tree.encode_strings(strings)} if strings else {}
        if create or self._general != _PLAIN or not self.layout.ocdbt:
            writes, _ = self.stored
            if not self.layout.ocdbt:
                native_write.check_names([write.name for write in writes])

    @functools.cached_property
    def _writes(self) -> list[LeafWrite]:
        helds = [leaf.held for leaf in self._leaves]
        return [held if isinstance(held, LeafWrite) else held.to_write() for held in helds]

    @functools.cached_property
    def stored(self) -> tuple[list[ArrayWrite], list[tree.ArrayMetadata]]:
        """What goes to the array store, and what `array_metadatas` says of it."""
        known: dict[Any, arrays.ArraySpec] = {}  # leaves that are alike share one object
        writes: list[ArrayWrite] = []
        metadatas: list[tree.ArrayMetadata] = []
        for leaf, w in zip(self._leaves, self._writes, strict=True):
            if w.shape is None:  # a string
                continue
            kind = (id(leaf.own), w.value_type, w.key_impl, w.shape, w.dtype, w.shard_shape)
            if (spec := known.get(kind)) is None:
                spec = known[kind] = _spec(leaf, w, self._general)
            writes.append(ArrayWrite(leaf.name, spec, w.shards, w.spread))
            if w.value_type == tree.ARRAY:
                extra = tree.ExtMetadata(w.key_impl) if w.key_impl else None
                shapes = w.shard_shape, spec.chunk_shape
                metadatas.append(tree.ArrayMetadata(leaf.name, *shapes, extra))
        return writes, metadatas

    def files(self) -> dict[str, bytes]:
        """The files that describe the tree, by name."""
        entries = list(self._empty)
        shardings: dict[str, str] = {}
        for leaf, w in zip(self._leaves, self._writes, strict=True):
            shape = w.shard_shape if w.value_type == tree.ARRAY else None
            entries.append(tree.Entry.of(leaf.path, w.value_type, shape))
            if (placed := w.sharding) is not None:
                shardings[leaf.name] = placed if isinstance(placed, str) else sharding_text(placed)
        metadata = tree.TreeMetadata(entries, self.layout.ocdbt, self.layout.encoding.zarr3)
        found = {names.TREE_METADATA: metadata.to_bytes(), **self._strings}
        return found | ({names.SHARDING: tree.encode_shardings(shardings)} if shardings else {})


def _own_options(value: Any, create: Any) -> Iterator[StorageOptions | None]:
    """What the user's function says of each leaf of a tree, without empty nodes."""
    for path, leaf in _tree_util.tree_flatten_with_path(value)[0]:
        own: Any = create(path, leaf)
        if not isinstance(own, StorageOptions | None):
            what = "scoped_storage_options_creator must return StorageOptions or None"
            raise TypeError(f"{what}, got {own!r} for {_tree_util.keystr(path)}")
        yield copy.copy(own)  # the next call may change it


def _spec(leaf: _Leaf, write: LeafWrite, general: StorageOptions) -> arrays.ArraySpec:
    """How an array is stored: of two options that are set that of the leaf wins."""
    own, shape, shard = leaf.own or _PLAIN, write.shape or (), write.shard_shape
    dtype = _dtype(leaf.path, write, general.dtype, own.dtype)
    axes = general.shard_axes if own.shard_axes is None else own.shard_axes
    size = own.chunk_byte_size or general.chunk_byte_size
    limit, each = size or arrays.DEFAULT_CHUNK_BYTES, dtype.itemsize
    chunk = arrays.choose_chunks(shard, each, single_shard=shard == shape, limit=limit)
    if axes or (size is not None and math.prod(chunk) * each > limit):
        chunk = arrays.cut_chunks(shard, each, axes=tuple(axes or ()), limit=limit)
    return arrays.ArraySpec(shape, arrays.zarr_dtype(dtype), chunk)


def _dtype(path: tree.KeyPath, write: LeafWrite, general: Any, own: Any) -> np.dtype[Any]:
    """The dtype on disk; numbers and typed keys keep theirs.

    Raises:
        UnsupportedLeafError: the leaf cannot be stored in the one that was chosen for it.
    """
    assert write.dtype is not None
    wished = general if own is None else own
    if wished is None or write.value_type == tree.SCALAR or write.key_impl is not None:
        return write.dtype
    wanted = np.dtype(wished)
    if own is None and dtypes.kind(wanted) != dtypes.kind(write.dtype):
        return write.dtype
    if not arrays.is_storable(wanted) or not dtypes.matches(write.dtype, wanted, (), strict=False):
        what = f"{tree.show(path)}: {show_array(write.shape or (), write.dtype)} cannot be stored"
        how = f"as {wanted.name}; set another storage_options.dtype for it"
        raise UnsupportedLeafError(f"{what} {how}")
    return wanted


def _cannot_be_saved(name: str, refused: Sequence[str], count: int) -> UnsupportedLeafError:
    first = f"checkpointable {name!r}: {len(refused)} of {count} leaves cannot be saved:"
    last = "Leaves may be JAX and NumPy arrays of the dtypes that zarr has, typed PRNG keys, int"
    last += " from -2**63 to 2**64 - 1, float, bool, str and None. Convert these leaves, take them"
    last += " out of the tree, or register a leaf handler, as flax_ckpt.leaves says"
    return UnsupportedLeafError("\n".join([first, *refused, last]))


def _start_transfers(leaves: Iterable[Any]) -> None:
    """Lets all device-to-host copies run at once before the first one is waited for."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not _no_value(leaf):
            leaf.copy_to_host_async()


def _no_value(leaf: Any) -> str:
    """Why an array has no value; empty if nothing is known against it."""
    if isinstance(leaf, Tracer):
        return "has no value inside jit: save after the jitted function has returned"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "the array was donated or deleted: save the state that the train step returned"
    return ""


def _unstorable(path: tree.KeyPath, name: str) -> str:
    """Why the format cannot hold a path; empty if it can."""
    if len(path) > tree.MAX_DEPTH:
        return f"lies more than {tree.MAX_DEPTH} levels deep: flatten the tree"
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return "a key has a lone surrogate, which no file name or JSON can hold: rename it"
    return ""


def _describe(leaf: Any) -> str:
    """Why there is no handler for a leaf."""
    kind = "jax.Array" if isinstance(leaf, jax.Array) else type(leaf).__qualname__
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return f"{kind} of dtype {leaf.dtype} cannot be saved"
    what = f"the int {leaf}" if isinstance(leaf, int) else f"a {type(leaf).__module__}.{kind}"
    return f"{what} cannot be saved"
