"""A tree as it will be written: host memory, and the contents of the files beside it.

Taking it is all of a save that blocks the caller. On CPU a JAX array is referenced, not copied,
so the snapshot is good for as long as it is held, whatever becomes of the array.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flax_ckpt.context import Context
from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, names, tree
from flax_ckpt.handlers import keypaths, storage_options
from flax_ckpt.handlers.storage_options import StorageOptions
from flax_ckpt.leaves.array import sharding_text
from flax_ckpt.leaves.base import LeafWrite
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage import native_write
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite

_PLAIN = StorageOptions()


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
        _start_transfers(leaves)
        copy = context.memory.deepcopy_host_arrays
        saving = context.array.saving
        encoding = arrays.Encoding(saving.use_zarr3, saving.use_compression)
        file_size = saving.ocdbt_target_data_file_size or 0
        self.layout = ArrayLayout(saving.use_ocdbt, encoding, file_size)
        create = saving.scoped_storage_options_creator
        owns = iter(storage_options.of_leaves(value, create)) if create else itertools.repeat(None)
        general = saving.storage_options
        self._general = None if create is None and general == _PLAIN else general
        self._empty: list[tuple[tree.KeyPath, str]] = []
        self._paths: list[tree.KeyPath] = []
        self._names: list[str] = []
        self._writes: list[LeafWrite] = []
        self._owns: list[StorageOptions | None] = []
        refused: list[tuple[tree.KeyPath, str]] = []
        found = [tree.name_of(path) for path in paths]
        joined = "\n".join(found)
        plain = joined.isascii() and max(map(len, paths), default=0) <= tree.MAX_DEPTH
        for path, name_on_disk, leaf in zip(paths, found, leaves, strict=True):
            handler = registry.for_value(leaf)
            if handler is None and keypaths.is_empty(leaf):
                self._empty.append((path, keypaths.empty_kind(leaf)))
                continue
            own = next(owns)
            reason = "" if plain else _unstorable(path, name_on_disk)
            try:
                if handler is not None and not reason:
                    self._writes.append(handler.write(leaf, copy=copy))
                    self._paths.append(path)
                    self._names.append(name_on_disk)
                    self._owns.append(own)
                    continue
            except Exception:  # JAX raises several types for an array without a value
                if not (reason := _no_value(leaf)):
                    raise
            refused.append((path, reason or f"{_describe(leaf)} cannot be saved"))
        if refused:
            raise _cannot_be_saved(name, refused, len(leaves))
        # Checked and encoded now: a key that cannot be stored must be an error of the call, not of
        # its thread. The rest can wait until training has gone on.
        prefixes = list(map(arrays.prefix, self._names)) if "/" in joined else self._names
        tree.unique_names(self._paths, prefixes)
        pairs = zip(self._names, self._writes, strict=True)
        strings = {name: w.string for name, w in pairs if w.string is not None}
        self._string_file = tree.encode_strings(strings) if strings else None
        if not self.layout.ocdbt:
            native_write.check_names([write.name for write in self.writes])
        elif self._general:
            _ = self.writes  # a dtype that cannot be is an error of the call, too

    @functools.cached_property
    def writes(self) -> list[ArrayWrite]:
        """What goes to the array store."""
        return [
            ArrayWrite(name, spec, w.shards, w.spread)
            for name, w, spec in zip(self._names, self._writes, self._specs, strict=True)
            if spec is not None
        ]

    @functools.cached_property
    def metadatas(self) -> list[tree.ArrayMetadata]:
        """What `array_metadatas` says."""
        return [
            tree.ArrayMetadata.of(name, w.shard_shape, spec.chunk_shape, w.key_impl)
            for name, w, spec in zip(self._names, self._writes, self._specs, strict=True)
            if spec is not None and w.value_type == tree.ARRAY
        ]

    @functools.cached_property
    def _specs(self) -> list[arrays.ArraySpec | None]:
        """How each leaf is stored; None for strings. Leaves that are alike share one object."""
        known: dict[Any, arrays.ArraySpec | None] = {}
        found: list[arrays.ArraySpec | None] = []
        for path, w, own in zip(self._paths, self._writes, self._owns, strict=True):
            kind = (id(own), w.value_type, w.key_impl, w.shape, w.dtype, w.shard_shape)
            if kind not in known:
                known[kind] = _spec(path, w, self._general, own)
            found.append(known[kind])
        return found

    def files(self) -> dict[str, bytes]:
        """The files that describe the tree, by name."""
        entries = [tree.Entry.of(path, kind) for path, kind in self._empty]
        shardings: dict[str, str] = {}
        for path, name, w in zip(self._paths, self._names, self._writes, strict=True):
            is_array = w.value_type == tree.ARRAY
            entries.append(tree.Entry.of(path, w.value_type, w.shard_shape if is_array else None))
            if w.sharding is not None:
                text = w.sharding if isinstance(w.sharding, str) else sharding_text(w.sharding)
                shardings[name] = text
        metadata = tree.TreeMetadata(entries, self.layout.ocdbt, self.layout.encoding.zarr3)
        found = {names.TREE_METADATA: metadata.to_bytes()}
        if shardings:
            found[names.SHARDING] = tree.encode_shardings(shardings)
        if self._string_file is not None:
            found[names.STRINGS] = self._string_file
        return found


def _spec(
    path: tree.KeyPath, write: LeafWrite, general: StorageOptions | None, own: StorageOptions | None
) -> arrays.ArraySpec | None:
    shape, dtype, shard = write.shape, write.dtype, write.shard_shape
    if shape is None or dtype is None:
        return None
    if general is None:
        limit, size = arrays.DEFAULT_CHUNK_BYTES, dtype.itemsize
        chunk = arrays.choose_chunks(shard, size, single_shard=shard == shape, limit=limit)
    else:
        dtype, chunk = storage_options.choose(general, own, path, write)
    return arrays.ArraySpec(shape, arrays.zarr_dtype(dtype), chunk)


def _cannot_be_saved(
    name: str, refused: Sequence[tuple[tree.KeyPath, str]], count: int
) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        f"checkpointable {name!r}: {len(refused)} of {count} leaves cannot be saved:\n"
        + "\n".join(f"  {tree.show(path)}: {reason}" for path, reason in refused)
        + "\nLeaves may be JAX and NumPy arrays of the dtypes that zarr has, typed PRNG"
        " keys, int from -2**63 to 2**64 - 1, float, bool, str and None. Convert these"
        " leaves, take them out of the tree, or register a leaf handler, as flax_ckpt.leaves"
        " says"
    )


def _start_transfers(leaves: Iterable[Any]) -> None:
    """Lets all device-to-host copies run at once before the first one is waited for."""
    if jax.default_backend() == "cpu":
        return
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not (isinstance(leaf, Tracer) or leaf.is_deleted()):
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
    kind = type(leaf).__qualname__
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return f"{'jax.Array' if isinstance(leaf, jax.Array) else kind} of dtype {leaf.dtype}"
    return f"the int {leaf}" if isinstance(leaf, int) else f"a {type(leaf).__module__}.{kind}"
