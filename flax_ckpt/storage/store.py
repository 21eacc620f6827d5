"""What an array store is: arrays by name, written and read in batches.

`native` writes and reads our own files, `tensor_store` reads all that others wrote. A region is a
box of an array, one `(start, stop)` per axis; bytes are C-ordered and little-endian.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.format.arrays import ArraySpec, Encoding, StoredArray

Region = tuple[tuple[int, int], ...]
Parts = list[NDArray[Any]]  # the regions that a read wants
Arrays = list[Parts]  # for each read


class Shard(msgspec.Struct, frozen=True, gc=False):
    """A part of an array in host memory.

    Attributes:
        start: where it begins in the array.
        data: what it holds.
    """

    start: tuple[int, ...]
    data: NDArray[Any]


class ArrayLayout(NamedTuple):
    """Where the arrays of a tree go, and how they are encoded.

    Attributes:
        ocdbt: into one database, else each into files of its own.
        encoding: of the arrays.
        file_size: bytes after which a database begins another data file; 0: never.
    """

    ocdbt: bool = True
    encoding: Encoding = Encoding()
    file_size: int = 0


class ArrayWrite(NamedTuple):
    """One array to write, and the shards of it that this process writes.

    Attributes:
        name: its name on disk.
        spec: shape, dtype and chunk shape of the whole array.
        shards: every shard begins at a chunk's corner.
        spread: whether every process writes its shards; else only the primary does.
    """

    name: str
    spec: ArraySpec
    shards: Sequence[Shard]
    spread: bool = False


class ArrayRead(msgspec.Struct, frozen=True, gc=False):
    """One array to read.

    Attributes:
        name: its name on disk.
        regions: the boxes wanted, each of them once.
        leaf: the leaf's key path, for error messages.
    """

    name: str
    regions: tuple[Region, ...]
    leaf: str


class ArrayStore(Protocol):
    """Reads arrays of one PyTree directory."""

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """Shape and dtype of arrays; a name that is not there is an error."""
        ...

    def read_arrays(self, reads: Sequence[ArrayRead]) -> Arrays:
        """The regions of each array, as arrays of the stored dtype."""
        ...


@functools.lru_cache(maxsize=4096)
def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of an array."""
    return tuple((0, size) for size in shape)


def read_resized(store: ArrayStore, reads: Sequence[ArrayRead]) -> Arrays:
    """Like `read_arrays`, of regions that may reach beyond the stored arrays: zeros are there."""
    stored = store.describe([read.name for read in reads])
    inside: list[ArrayRead] = []
    for read in reads:
        regions = tuple([_clipped(region, stored[read.name].shape) for region in read.regions])
        inside.append(ArrayRead(read.name, regions, read.leaf))
    return [
        [_filled(part, region) for part, region in zip(parts, read.regions, strict=True)]
        for parts, read in zip(store.read_arrays(inside), reads, strict=True)
    ]


def _clipped(region: Region, shape: tuple[int, ...]) -> Region:
    return tuple((min(a, n), min(b, n)) for (a, b), n in zip(region, shape, strict=True))


def _filled(part: NDArray[Any], region: Region) -> NDArray[Any]:
    """The region, its beginning being the part that was read and the rest zeros."""
    shape = tuple([stop - start for start, stop in region])
    if part.shape == shape:
        return part
    array = np.zeros(shape, part.dtype)
    array[tuple(map(slice, part.shape))] = part
    return array
