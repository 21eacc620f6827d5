"""How each leaf of a tree is stored: the options of the tree, and those of the leaf over them.

for storage in per_leaf(tree, context.array.saving):
    dtype = storage.dtype_of(write, path)
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays, chunks, tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.base import LeafWrite, show_array
from flax_ckpt.options import ArrayOptions

StorageOptions = ArrayOptions.Saving.StorageOptions
_UNSET = StorageOptions()
_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees


class LeafStorage(NamedTuple):
    """How one leaf is stored.

    Attributes:
        general: the options of the whole tree.
        own: those of the leaf, which win; a field that is None says nothing.
    """

    general: StorageOptions
    own: StorageOptions

    def dtype_of(self, write: LeafWrite, path: tree.KeyPath) -> np.dtype[Any] | None:
        """The dtype on disk of what is written; numbers and typed keys keep theirs.

        Raises:
            UnsupportedLeafError: the leaf cannot be stored in the dtype that was chosen for it.
        """
        wished = self.general.dtype if self.own.dtype is None else self.own.dtype
        fixed = write.value_type == tree.SCALAR or write.key_impl is not None
        if write.dtype is None or wished is None or fixed:
            return write.dtype
        wanted = np.dtype(wished)
        if self.own.dtype is None and dtypes.kind(wanted) != dtypes.kind(write.dtype):
            return write.dtype
        if not arrays.is_storable(wanted) or not dtypes.matches(
            write.dtype, wanted, (), strict=False
        ):
            raise UnsupportedLeafError(
                f"{tree.show(path)}: {show_array(write.shape or (), write.dtype)} cannot be stored"
                f" as {wanted.name}; set another storage_options.dtype for it"
            )
        return wanted

    def chunk_of(
        self, shard_shape: tuple[int, ...], itemsize: int, *, single_shard: bool
    ) -> tuple[int, ...]:
        """The shape of a chunk of a shard."""
        own, general = self.own, self.general
        axes = general.shard_axes if own.shard_axes is None else own.shard_axes
        size = own.chunk_byte_size or general.chunk_byte_size
        limit = size or arrays.DEFAULT_CHUNK_BYTES
        if not axes:
            chosen = arrays.choose_chunks(
                shard_shape, itemsize, single_shard=single_shard, limit=limit
            )
            if size is None or np.prod(chosen, dtype=object) * itemsize <= limit:
                return chosen
        return chunks.cut(shard_shape, itemsize, axes=tuple(axes or ()), limit=limit)


def per_leaf(value: Any, saving: ArrayOptions.Saving) -> Iterator[LeafStorage]:
    """For each leaf of a tree, without empty nodes, how it is stored.

    Raises:
        TypeError: what the user's function returned are no storage options.
    """
    create = saving.scoped_storage_options_creator
    if create is None:
        return itertools.repeat(LeafStorage(saving.storage_options, _UNSET))
    found: list[LeafStorage] = []
    for path, leaf in _tree_util.tree_flatten_with_path(value)[0]:
        own: Any = create(path, leaf)
        if own is not None and not isinstance(own, StorageOptions):
            raise TypeError(
                "scoped_storage_options_creator must return StorageOptions or None, got"
                f" {own!r} for {_tree_util.keystr(path)}"
            )
        found.append(LeafStorage(saving.storage_options, own or _UNSET))
    return iter(found)
