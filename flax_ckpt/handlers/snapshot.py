"""A tree as it will be written: host memory, and the contents of the files beside it.

Taking it is all of a save that blocks the caller. On CPU a JAX array is referenced, not copied,
so the snapshot is good for as long as it is held, whatever becomes of the array.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flax_ckpt.context import Context
from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, names, tree
from flax_ckpt.format.encoding import Encoding
from flax_ckpt.handlers import keypaths, storage_options
from flax_ckpt.handlers.storage_options import LeafStorage
from flax_ckpt.leaves.base import LeafWrite
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage import file_write
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite


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
        layout: where the arrays go, and how they are encoded.

    Raises:
        UnsupportedLeafError: lists every leaf that cannot be saved.
        DuplicateNameError: lists the leaves that would share a name on disk.
    """

    def __init__(self, name: str, value: Any, registry: LeafRegistry, context: Context) -> None:
        found, _ = keypaths.flatten(value)
        _start_transfers(leaf for _, leaf in found)
        self.entries: list[tree.Entry] = []
        self.arrays: list[ArrayWrite] = []
        self.metadatas: list[tree.ArrayMetadata] = []
        self._shardings: dict[str, str] = {}
        self._strings: dict[str, str] = {}
        saving = context.array.saving
        storages = storage_options.per_leaf(value, saving)
        encoding = Encoding(bool(saving.use_zarr3), bool(saving.use_compression))
        file_size = saving.ocdbt_target_data_file_size or 0
        self.layout = ArrayLayout(bool(saving.use_ocdbt), encoding, file_size)
        refused: list[str] = []
        for path, leaf in found:
            if keypaths.is_empty(leaf):
                kind = keypaths.empty_kind(leaf)
                self.entries.append(tree.Entry(path, tree.name_of(path), kind))
                continue
            storage = next(storages)
            handler = registry.for_value(leaf)
            reason = _refusal(path, leaf) if handler else f"{_describe(leaf)} cannot be saved"
            if handler is None or reason:
                refused.append(f"  {tree.show(path)}: {reason}")
            elif not refused:
                write = handler.write(leaf, copy=context.memory.deepcopy_host_arrays)
                self._add(path, write, storage)
        if refused:
            raise UnsupportedLeafError(
                f"checkpointable {name!r}: {len(refused)} of {len(found)} leaves cannot be saved:\n"
                + "\n".join(refused)
                + "\nLeaves may be JAX and NumPy arrays of the dtypes that zarr has, typed PRNG"
                " keys, int from -2**63 to 2**64 - 1, float, bool, str and None. Convert these"
                " leaves, take them out of the tree, or register a leaf handler"
            )
        if not self.layout.ocdbt:
            file_write.check_names([array.name for array in self.arrays])
        tree.unique_names(
            (e.path, arrays.prefix(e.name)) for e in self.entries if e.value_type not in tree.EMPTY
        )
        # Encoded now: a key that cannot be stored must be an error of the call, not of its thread.
        self._string_file = tree.encode_strings(self._strings) if self._strings else None

    def _add(self, path: tree.KeyPath, write: LeafWrite, storage: LeafStorage) -> None:
        name = tree.name_of(path)
        placed = write.shard_shape if write.value_type == tree.ARRAY else None
        self.entries.append(tree.Entry(path, name, write.value_type, placed))
        if write.sharding is not None:
            self._shardings[name] = write.sharding
        if write.string is not None:
            self._strings[name] = write.string
        dtype = storage.dtype_of(write, tree.show(path))
        if write.shape is None or dtype is None:
            return
        single = write.shard_shape == write.shape
        chunk = storage.chunk_of(write.shard_shape, dtype.itemsize, single_shard=single)
        spec = arrays.ArraySpec(write.shape, arrays.zarr_dtype(dtype), chunk)
        self.arrays.append(ArrayWrite(name, spec, write.shards, write.spread))
        if placed is not None:
            self.metadatas.append(tree.ArrayMetadata(name, placed, chunk, write.key_impl))

    def files(self) -> dict[str, bytes]:
        """The files that describe the tree, by name."""
        layout = self.layout
        metadata = tree.TreeMetadata(tuple(self.entries), layout.ocdbt, layout.encoding.zarr3)
        found = {names.TREE_METADATA: metadata.to_bytes()}
        if self._shardings:
            found[names.SHARDING] = tree.encode_shardings(self._shardings)
        if self._string_file is not None:
            found[names.STRINGS] = self._string_file
        return found


def _start_transfers(leaves: Iterable[Any]) -> None:
    """Lets all device-to-host copies run at once before the first one is waited for."""
    if jax.default_backend() == "cpu":
        return
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not (isinstance(leaf, Tracer) or leaf.is_deleted()):
            leaf.copy_to_host_async()


def _refusal(path: tree.KeyPath, leaf: Any) -> str:
    """Why a leaf of a kind that can be saved cannot be; empty if it can."""
    if isinstance(leaf, Tracer):
        return "has no value inside jit: save after the jitted function has returned"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "the array was donated or deleted: save the state that the train step returned"
    if len(path) > tree.MAX_DEPTH:
        return f"lies {len(path)} levels deep, more than {tree.MAX_DEPTH}: flatten the tree"
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
