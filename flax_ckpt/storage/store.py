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

from flax_ckpt.format.arrays import ArraySpec
from flax_ckpt.format.encoding import DEFAULT, Encoding

Region = tuple[tuple[int, int], ...]

# The index of an array's first element, by its rank: one object for all.
origin = functools.cache((0,).__mul__)


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
    encoding: Encoding = DEFAULT
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


class StoredArray(NamedTuple):
    """What a store knows of an array before reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class ArrayStore(Protocol):
    """Reads arrays of one PyTree directory."""

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """Shape and dtype of arrays; a name that is not there is an error."""
        ...

    def read_arrays(self, reads: Sequence[ArrayRead]) -> list[list[NDArray[Any]]]:
        """The regions of each array, as arrays of the stored dtype."""
        ...


@functools.lru_cache(maxsize=4096)
def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of an array."""
    return tuple((0, size) for size in shape)
