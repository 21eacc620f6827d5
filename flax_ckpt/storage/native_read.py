"""Reads arrays from an OCDBT database, without TensorStore, where they are stored plainly.

Chunks are read into memory that JAX on CPU can adopt: small ones that lie side by side in one
call, large ones straight into the array they belong to. Each is compared with its own CRC-32C
and with the table's, so that an old block with its own valid checksum is noticed too.
"""

import concurrent.futures
import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import crc32c
import msgspec
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format import arrays as zarr
from flax_ckpt.format.ocdbt import Value, ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.datafile import ALIGNMENT, TRAILER, Bytes, aligned_empty
from flax_ckpt.storage.store import ArrayRead, ArrayStore, Region, StoredArray, origin

_SMALL: Final = 1 << 20  # chunks up to here are read together and share memory
_GROUP: Final = 4 << 20  # how much at most
_GAP: Final = 4096  # bytes of no interest that are read to save a call
_THREADS: Final = min(4, os.cpu_count() or 1)
_PENDING: Final[NDArray[Any]] = np.empty(0)


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk to read.

    Attributes:
        leaf, key, ref: whose it is, and where.
        trailer: bytes of the CRC-32C that follows it, 0 or 4.
        parts: takes the array at `position`, if the chunk is all of one, described by `stored`.
        place: else, what puts the bytes where they belong.
        into: memory that they can be read into, so that there is nothing left to put.
    """

    leaf: str
    key: bytes
    ref: Value
    trailer: int
    parts: list[NDArray[Any]]
    position: int
    stored: StoredArray
    place: Callable[[Bytes], None] | None = None
    into: Bytes | None = None

    @property
    def span(self) -> ValueRef:
        """Where it is in a data file."""
        assert isinstance(self.ref, ValueRef)
        return self.ref


class NativeStore:
    """Arrays of one database; implements :class:`ArrayStore`.

    Args:
        database: opened; its owner closes it.
        other: reads the arrays whose codecs are not ours.
    """

    def __init__(self, database: Database, other: ArrayStore) -> None:
        self._database = database
        self._other = other
        self._infos: dict[str, zarr.ZarrInfo] = {}

    def _info(self, name: str) -> zarr.ZarrInfo:
        if name not in self._infos:
            key = zarr.zarr_key(name)
            data = self._database.read(key)
            expected = self._database.crcs.get(key)
            if expected is not None and crc32c.crc32c(data) != expected:
                raise DamagedCheckpointError(
                    f"{self._database.directory}: the description of the array {name!r} is not the"
                    " one that was saved; restore another step"
                )
            self._infos[name] = zarr.parse_zarr3(data)
        return self._infos[name]

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """See :class:`ArrayStore`."""
        return {name: _stored(self._info(name)) for name in names}

    def read_arrays(self, reads: Sequence[ArrayRead]) -> list[list[NDArray[Any]]]:
        """See :class:`ArrayStore`."""
        results: list[list[NDArray[Any]]] = [[] for _ in reads]
        chunks: list[_Chunk] = []
        foreign: list[int] = []
        for number, read in enumerate(reads):
            info = self._info(read.name)
            if not info.native:
                foreign.append(number)
                continue
            for region in read.regions:
                chunks += self._plan(read, info, region, results[number])
        self._read_chunks(chunks)
        if foreign:
            self._database.check_files()
            others = self._other.read_arrays([reads[number] for number in foreign])
            for number, parts in zip(foreign, others, strict=True):
                results[number] = parts
        return results

    def _plan(
        self, read: ArrayRead, info: zarr.ZarrInfo, region: Region, parts: list[NDArray[Any]]
    ) -> Iterator[_Chunk]:
        """The chunks that a region needs; the region's array is added to `parts`."""
        stored = _stored(info)
        dtype, shape = stored.dtype, tuple([stop - start for start, stop in region])
        trailer = TRAILER if info.crc32c else 0
        nbytes = math.prod(info.chunk_shape) * dtype.itemsize
        position = len(parts)
        if info.chunk_shape == info.shape == shape and nbytes <= _SMALL:
            parts.append(_PENDING)
            found = self._find(read, origin(len(shape)), nbytes + trailer)
            yield _Chunk(read.leaf, *found, trailer, parts, position, stored)
            return
        array = aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        parts.append(array)
        grid = [
            range(start // step, -(-stop // step))
            for (start, stop), step in zip(region, info.chunk_shape, strict=True)
        ]
        for index in itertools.product(*grid):
            found = self._find(read, index, nbytes + trailer)
            copy, into = _destination(array, region, info.chunk_shape, index)
            yield _Chunk(read.leaf, *found, trailer, parts, position, stored, copy, into)

    def _find(self, read: ArrayRead, index: tuple[int, ...], expected: int) -> tuple[bytes, Value]:
        """The key of a chunk, and where it is; checks that it has as many bytes as expected."""
        key = zarr.chunk_key(read.name, index)
        ref = self._database.values.get(key)
        length = len(ref) if isinstance(ref, bytes) else ref.length if ref else 0
        if ref is None or length != expected:
            found = "is missing" if ref is None else f"has {length} bytes"
            raise DamagedCheckpointError(
                f"{read.leaf}: its chunk {list(index)} in {self._database.directory} {found},"
                f" expected {expected} bytes; restore another step"
            )
        return key, ref

    def _read_chunks(self, chunks: list[_Chunk]) -> None:
        placed: list[_Chunk] = []
        for chunk in chunks:
            if isinstance(chunk.ref, bytes):
                self._deliver(chunk, np.frombuffer(bytearray(chunk.ref), np.uint8))
            else:
                placed.append(chunk)
        placed.sort(key=operator.attrgetter("ref"))
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._read_group, _groups(placed)))

    def _read_group(self, group: list[_Chunk]) -> None:
        chunk, first = group[0], group[0].span
        reader = self._database.reader(first.file)
        if chunk.into is not None:
            rest = np.empty(first.length - len(chunk.into), np.uint8)
            reader.read_into(first.offset, chunk.into, rest)
            self._check(chunk, chunk.into, rest)
            return
        lead = first.offset % ALIGNMENT  # so that the file's alignment becomes the memory's
        end = max(chunk.span.offset + chunk.span.length for chunk in group)
        buffer = aligned_empty(lead + end - first.offset)
        reader.read_into(first.offset, buffer[lead:])
        for chunk in group:
            begin = lead + chunk.span.offset - first.offset
            self._deliver(chunk, buffer[begin : begin + chunk.span.length])

    def _deliver(self, chunk: _Chunk, value: Bytes) -> None:
        """Checks a whole value and gives it to the array it belongs to."""
        split = len(value) - chunk.trailer
        data = value[:split]
        self._check(chunk, data, value[split:])
        if chunk.place is not None:
            chunk.place(data)
        else:
            stored = chunk.stored
            chunk.parts[chunk.position] = data.view(stored.dtype).reshape(stored.shape)

    def _check(self, chunk: _Chunk, data: Bytes, rest: Bytes) -> None:
        """Compares a chunk with its checksums; `rest` is padding, if any, and the trailer."""
        padding = len(rest) - chunk.trailer
        crc = crc32c.crc32c(data.data)
        if padding:
            crc = crc32c.crc32c(rest[:padding].data, crc)
        own = int.from_bytes(rest[padding:].tobytes(), "little") if chunk.trailer else crc
        table = self._database.crcs.get(chunk.key, own)
        if crc == own == table:
            return
        where = f"an index node in {self._database.directory}"
        if not isinstance(ref := chunk.ref, bytes):
            path = self._database.reader(ref.file).path
            where = f"bytes {ref.offset} to {ref.offset + ref.length} of {path}"
        expected = f"{table:08x}" if table == own else f"{table:08x} (its own trailer: {own:08x})"
        raise DamagedCheckpointError(
            f"{chunk.leaf}: damaged: {where} have CRC-32C {crc:08x}, saved with {expected};"
            " restore another step"
        )


@functools.lru_cache(maxsize=4096)
def _stored(info: zarr.ZarrInfo) -> StoredArray:
    return StoredArray(info.shape, zarr.numpy_dtype(info.dtype))


def _destination(
    array: NDArray[Any], region: Region, chunk_shape: tuple[int, ...], index: tuple[int, ...]
) -> tuple[Callable[[Bytes], None], Bytes | None]:
    """How a chunk gets into the array of a region: what copies it, and memory to read it into.

    It can be read into the array if what the region wants of it is one run of bytes in both, the
    first of the chunk. That splits the first axis on which chunks have more than one element, at
    most: the rest of the chunk, or its padding at the array's end, then comes after it.
    """
    low = [i * step for i, step in zip(index, chunk_shape, strict=True)]
    common = [
        (max(a, start), min(a + step, stop))
        for a, step, (start, stop) in zip(low, chunk_shape, region, strict=True)
    ]
    source = tuple(slice(a - i, b - i) for (a, b), i in zip(common, low, strict=True))
    inside = [slice(a - i, b - i) for (a, b), (i, _) in zip(common, region, strict=True)]
    target = array[..., *inside]  # `...` for rank 0

    def copy(data: Bytes) -> None:
        target[...] = data.view(target.dtype).reshape(chunk_shape)[source]

    rest = next((axis for axis, step in enumerate(chunk_shape) if step > 1), 0) + 1
    leads = target.shape[rest:] == chunk_shape[rest:] and not any(part.start for part in source)
    return copy, target.reshape(-1).view(np.uint8) if leads and target.flags.c_contiguous else None


def _groups(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Sorted chunks that are read in one call: alone if large or placed, else with neighbours."""
    group: list[_Chunk] = []
    for chunk in chunks:
        ref = chunk.span
        alone = chunk.into is not None or ref.length > _SMALL
        if group:
            first, last = group[0].span, group[-1].span
            near = ref.file == first.file and ref.offset - (last.offset + last.length) <= _GAP
            if alone or not near or ref.offset + ref.length - first.offset > _GROUP:
                yield group
                group = []
        if alone:
            yield [chunk]
        else:
            group.append(chunk)
    if group:
        yield group
