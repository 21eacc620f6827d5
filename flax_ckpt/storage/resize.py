"""Reads arrays as if they had another shape: cut, or filled with zeros, at the end of each axis.

store = ResizingStore(store)
store.read_arrays([ArrayRead("w", (((0, 8), (0, 2)),), "w")])  # of an array of shape [4, 3]
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from flax_ckpt.storage.datafile import aligned_empty
from flax_ckpt.storage.store import ArrayRead, ArrayStore, Region, StoredArray


class ResizingStore:
    """Regions may reach beyond the stored arrays; implements :class:`ArrayStore`.

    Args:
        store: has the arrays; of them only what lies in a region is read.
    """

    def __init__(self, store: ArrayStore) -> None:
        self._store = store

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """See :class:`ArrayStore`: the stored shapes."""
        return self._store.describe(names)

    def read_arrays(self, reads: Sequence[ArrayRead]) -> list[list[NDArray[Any]]]:
        """See :class:`ArrayStore`."""
        stored = self._store.describe([read.name for read in reads])
        inside = [
            msgspec.structs.replace(
                read, regions=tuple(_clip(r, stored[read.name].shape) for r in read.regions)
            )
            for read in reads
        ]
        found = self._store.read_arrays(inside)
        return [
            [_fill(part, region) for part, region in zip(parts, read.regions, strict=True)]
            for parts, read in zip(found, reads, strict=True)
        ]


def _clip(region: Region, shape: tuple[int, ...]) -> Region:
    """The part of a region that is inside an array; may be empty."""
    return tuple(
        (min(start, size), min(stop, size))
        for (start, stop), size in zip(region, shape, strict=True)
    )


def _fill(part: NDArray[Any], region: Region) -> NDArray[Any]:
    """The region, its beginning being the part that was read and the rest zeros."""
    shape = tuple([stop - start for start, stop in region])
    if part.shape == shape:
        return part
    memory = aligned_empty(math.prod(shape) * part.dtype.itemsize)
    memory[:] = 0
    array = memory.view(part.dtype).reshape(shape)
    array[tuple(slice(size) for size in part.shape)] = part
    return array
