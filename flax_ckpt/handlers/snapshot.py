"""A tree as it will be written: host memory, and the contents of the files beside it.

Taking it is all of a save that blocks the caller. On CPU a JAX array is referenced, not copied,
so the snapshot is good for as long as it is held, whatever becomes of the array.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flax_ckpt.context import Context
from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves.base import LeafWrite
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage.store import ArrayWrite


class Snapshot:
    """What a save writes of one tree.

    Args:
        name: of the checkpointable, for error messages.
        value: the tree.
        registry: handlers of its leaves.
        context: options.

    Attributes:
        entries: all leaves and empty nodes.
        arrays: what goes to the array store.
        metadatas: what `array_metadatas` says.

    Raises:
        UnsupportedLeafError: lists every leaf that cannot be saved.
        DuplicateNameError: lists the leaves that would share a name on disk.
    """

    def __init__(self, name: str, value: Any, registry: LeafRegistry, context: Context) -> None:
        found, _ = keypaths.flatten(value)
        _start_transfers(leaf for _, leaf in found)
        writes = _writes(name, found, registry, context)
        self.entries = [
            tree.Entry(path, tree.name_of(path), keypaths.empty_kind(leaf))
            if write is None
            else tree.Entry(path, tree.name_of(path), write.value_type, _write_shape(write))
            for (path, leaf), write in zip(found, writes, strict=True)
        ]
        named = [(e, w) for e, w in zip(self.entries, writes, strict=True) if w is not None]
        tree.unique_names([(entry.path, arrays.prefix(entry.name)) for entry, _ in named])
        limit = context.array.saving.storage_options.chunk_byte_size
        self.arrays = [
            _array(entry.name, write, limit or arrays.DEFAULT_CHUNK_BYTES)
            for entry, write in named
            if write.shape is not None
        ]
        specs = {array.name: array.spec for array in self.arrays}
        self.metadatas = [
            tree.ArrayMetadata(
                entry.name, write.shard_shape, specs[entry.name].chunk_shape, write.key_impl
            )
            for entry, write in named
            if write.value_type == tree.ARRAY
        ]
        self._shardings = {e.name: w.sharding for e, w in named if w.sharding is not None}
        strings = {e.name: w.string for e, w in named if w.string is not None}
        # Encoded now: a key that cannot be stored must be an error of the call, not of its thread.
        self._strings = tree.encode_strings(strings) if strings else None

    def files(self) -> dict[str, bytes]:
        """The files that describe the tree, by name."""
        found = {names.TREE_METADATA: tree.TreeMetadata(tuple(self.entries)).to_bytes()}
        if self._shardings:
            found[names.SHARDING] = tree.encode_shardings(self._shardings)
        if self._strings is not None:
            found[names.STRINGS] = self._strings
        return found


def _start_transfers(leaves: Iterable[Any]) -> None:
    """Lets all device-to-host copies run at once before the first one is waited for."""
    if jax.default_backend() == "cpu":
        return
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not (isinstance(leaf, Tracer) or leaf.is_deleted()):
            leaf.copy_to_host_async()


def _writes(
    name: str, found: list[tuple[tree.KeyPath, Any]], registry: LeafRegistry, context: Context
) -> list[LeafWrite | None]:
    copy = context.memory.deepcopy_host_arrays
    writes: list[LeafWrite | None] = []
    refused: list[str] = []
    for path, leaf in found:
        if keypaths.is_empty(leaf):
            writes.append(None)
            continue
        handler = registry.for_value(leaf)
        reason = _refusal(path, leaf) if handler else f"{_describe(leaf)} cannot be saved"
        if handler is None or reason:
            refused.append(f"  {tree.show(path)}: {reason}")
            continue
        writes.append(handler.write(leaf, copy=copy))
    if refused:
        raise UnsupportedLeafError(
            f"checkpointable {name!r}: {len(refused)} of {len(found)} leaves cannot be saved:\n"
            + "\n".join(refused)
            + "\nLeaves may be JAX and NumPy arrays of the dtypes that zarr has, typed PRNG keys,"
            " int from -2**63 to 2**64 - 1, float, bool, str and None. Convert these leaves, take"
            " them out of the tree, or register a leaf handler"
        )
    return writes


def _refusal(path: tree.KeyPath, leaf: Any) -> str:
    """Why a leaf of a kind that can be saved cannot be; empty if it can."""
    if isinstance(leaf, Tracer):
        return "has no value inside jit: save after the jitted function has returned"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "the array was donated or deleted: save the state that the train step returned"
    try:
        tree.name_of(path).encode()
    except UnicodeEncodeError:
        return "a key has a lone surrogate, which no file name or JSON can hold: rename it"
    return ""


def _describe(leaf: Any) -> str:
    kind = type(leaf).__qualname__
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return f"{'jax.Array' if isinstance(leaf, jax.Array) else kind} of dtype {leaf.dtype}"
    return f"the int {leaf}" if isinstance(leaf, int) else f"a {type(leaf).__module__}.{kind}"


def _write_shape(write: LeafWrite) -> tuple[int, ...] | None:
    return write.shard_shape if write.value_type == tree.ARRAY else None


def _array(name: str, write: LeafWrite, limit: int) -> ArrayWrite:
    assert write.shape is not None
    assert write.dtype is not None
    single = write.shard_shape == write.shape
    chunk = arrays.choose_chunks(
        write.shard_shape, write.dtype.itemsize, single_shard=single, limit=limit
    )
    spec = arrays.ArraySpec(write.shape, arrays.zarr_dtype(write.dtype), chunk)
    return ArrayWrite(name, spec, write.shards, write.spread)
