"""How a leaf is stored: the options of its tree, and over them its own.

creator = context.array.saving.scoped_storage_options_creator
for own, path, write in zip(of_leaves(tree, creator), paths, writes):
    dtype, chunk = choose(general, own, path, write)
"""

from typing import Any

import jax
import numpy as np

from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.base import LeafWrite, show_array
from flax_ckpt.options import ArrayOptions

StorageOptions = ArrayOptions.Saving.StorageOptions
_UNSET = StorageOptions()
_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees


def of_leaves(value: Any, create: Any) -> list[StorageOptions | None]:
    """What the user's function says of each leaf of a tree, without empty nodes.

    Raises:
        TypeError: what it returned are no storage options.
    """
    found: list[StorageOptions | None] = []
    for path, leaf in _tree_util.tree_flatten_with_path(value)[0]:
        own: Any = create(path, leaf)
        if own is not None and not isinstance(own, StorageOptions):
            raise TypeError(
                "scoped_storage_options_creator must return StorageOptions or None, got"
                f" {own!r} for {_tree_util.keystr(path)}"
            )
        found.append(own)
    return found


def choose(
    general: StorageOptions, own: StorageOptions | None, path: tree.KeyPath, write: LeafWrite
) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype on disk and the shape of a chunk of an array.

    Args:
        general: the options of the whole tree.
        own: those of the leaf, which win; a field that is None says nothing.
        path: of the leaf.
        write: an array, no string.

    Raises:
        UnsupportedLeafError: the leaf cannot be stored in the dtype that was chosen for it.
    """
    own = own or _UNSET
    dtype = _dtype(general, own, path, write)
    shard, itemsize = write.shard_shape, dtype.itemsize
    axes = general.shard_axes if own.shard_axes is None else own.shard_axes
    size = own.chunk_byte_size or general.chunk_byte_size
    limit = size or arrays.DEFAULT_CHUNK_BYTES
    if not axes:
        single = shard == write.shape
        chosen = arrays.choose_chunks(shard, itemsize, single_shard=single, limit=limit)
        if size is None or np.prod(chosen, dtype=object) * itemsize <= limit:
            return dtype, chosen
    return dtype, arrays.cut_chunks(shard, itemsize, axes=tuple(axes or ()), limit=limit)


def _dtype(
    general: StorageOptions, own: StorageOptions, path: tree.KeyPath, write: LeafWrite
) -> np.dtype[Any]:
    """Numbers and typed keys keep theirs."""
    assert write.dtype is not None
    wished = general.dtype if own.dtype is None else own.dtype
    if wished is None or write.value_type == tree.SCALAR or write.key_impl is not None:
        return write.dtype
    wanted = np.dtype(wished)
    if own.dtype is None and dtypes.kind(wanted) != dtypes.kind(write.dtype):
        return write.dtype
    castable = dtypes.matches(write.dtype, wanted, (), strict=False)
    if not arrays.is_storable(wanted) or not castable:
        raise UnsupportedLeafError(
            f"{tree.show(path)}: {show_array(write.shape or (), write.dtype)} cannot be stored"
            f" as {wanted.name}; set another storage_options.dtype for it"
        )
    return wanted
