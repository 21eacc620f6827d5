"""Reads arrays from an OCDBT database, without TensorStore, where they are stored plainly.

Chunks are read into memory that JAX on CPU can adopt: small ones that lie side by side in one
call, large ones straight into the array they belong to. Each is compared with its own CRC-32C
and with the table's, so that an old block with its own valid checksum is noticed too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import crc32c
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format import arrays as zarr
from flax_ckpt.format.ocdbt import ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.datafile import ALIGNMENT, TRAILER, Bytes, aligned_empty
from flax_ckpt.storage.store import ArrayRead, ArrayStore, Region, StoredArray

_SMALL: Final = 1 << 20  # chunks up to here are read together and share memory
_GROUP: Final = 4 << 20  # how much at most
_GAP: Final = 4096  # bytes of no interest that are read to save a call
_THREADS: Final = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(slots=True)
class _Chunk:
    """A chunk to read; `into` is where its bytes go, or `place` takes them."""

    leaf: str
    key: bytes
    ref: ValueRef | bytes
    has_trailer: bool
    into: Bytes | None
    place: Callable[[Bytes], None] | None


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
        info = self._infos.get(name)
        if info is None:
            info = self._infos[name] = self._read_info(name)
        return info

    def _read_info(self, name: str) -> zarr.ZarrInfo:
        key = zarr.zarr_key(name)
        data = self._database.read(key)
        expected = self._database.crcs.get(key)
        if expected is not None and crc32c.crc32c(data) != expected:
            raise DamagedCheckpointError(
                f"{self._database.directory}: the description of the array {name!r} is not the"
                " one that was saved; restore another step"
            )
        return zarr.parse_zarr3(data)

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """See :class:`ArrayStore`."""
        infos = {name: self._info(name) for name in names}
        return {n: StoredArray(i.shape, zarr.numpy_dtype(i.dtype)) for n, i in infos.items()}

    def read_arrays(self, reads: Sequence[ArrayRead]) -> list[list[NDArray[Any]]]:
        """See :class:`ArrayStore`."""
        results: list[list[NDArray[Any]]] = []
        chunks: list[_Chunk] = []
        foreign: list[int] = []
        for number, read in enumerate(reads):
            info = self._info(read.name)
            parts: list[NDArray[Any]] = []
            results.append(parts)
            if info.native:
                for region in read.regions:
                    chunks += self._plan(read, info, region, parts)
            else:
                foreign.append(number)
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
        dtype = zarr.numpy_dtype(info.dtype)
        shape = tuple([stop - start for start, stop in region])
        position = len(parts)
        nbytes = math.prod(info.chunk_shape) * dtype.itemsize
        if 0 in shape:
            parts.append(np.empty(shape, dtype))
            return
        if info.chunk_shape == info.shape == shape and nbytes <= _SMALL:
            parts.append(np.empty(0))

            def adopt(data: Bytes) -> None:
                parts[position] = data.view(dtype).reshape(shape)

            yield self._chunk(read, info, (0,) * len(shape), nbytes, None, adopt)
            return
        flat = aligned_empty(math.prod(shape) * dtype.itemsize)
        array = flat.view(dtype).reshape(shape)
        parts.append(array)
        grid = [
            range(start // step, -(-stop // step))
            for (start, stop), step in zip(region, info.chunk_shape, strict=True)
        ]
        for index in itertools.product(*grid):
            box = _box(index, info)
            span = _contiguous(box, region, info.chunk_shape, dtype.itemsize)
            into = None if span is None else flat[span[0] : span[1]]
            place = None if into is not None else _copier(array, region, box, info, dtype)
            yield self._chunk(read, info, index, nbytes, into, place)

    def _chunk(
        self,
        read: ArrayRead,
        info: zarr.ZarrInfo,
        index: tuple[int, ...],
        nbytes: int,
        into: Bytes | None,
        place: Callable[[Bytes], None] | None,
    ) -> _Chunk:
        key = zarr.chunk_key(read.name, index)
        ref = self._database.values.get(key)
        expected = nbytes + (TRAILER if info.crc32c else 0)
        length = len(ref) if isinstance(ref, bytes) else ref.length if ref else 0
        if ref is None or length != expected:
            found = "is missing" if ref is None else f"has {length} bytes"
            raise DamagedCheckpointError(
                f"{read.leaf}: its chunk {list(index)} in {self._database.directory} {found},"
                f" expected {expected} bytes; restore another step"
            )
        return _Chunk(read.leaf, key, ref, info.crc32c, into, place)

    def _read_chunks(self, chunks: list[_Chunk]) -> None:
        placed: list[tuple[ValueRef, _Chunk]] = []
        for chunk in chunks:
            if isinstance(chunk.ref, bytes):
                value = np.frombuffer(bytearray(chunk.ref), np.uint8)
                self._deliver(chunk, value, f"an index node in {self._database.directory}")
            else:
                placed.append((chunk.ref, chunk))
        groups = list(_groups(placed))
        if len(groups) < 2:
            for group in groups:
                self._read_group(group)
            return
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(self._read_group, groups):
                pass

    def _read_group(self, group: list[tuple[ValueRef, _Chunk]]) -> None:
        first, chunk = group[0]
        reader = self._database.reader(first.file)
        if chunk.into is not None:
            rest = np.empty(first.length - len(chunk.into), np.uint8)
            reader.read_into(first.offset, chunk.into, rest)
            self._check(chunk, chunk.into, rest, _place_of(first, reader.path))
            return
        lead = first.offset % ALIGNMENT  # so that the file's alignment becomes the memory's
        end = max(ref.offset + ref.length for ref, _ in group)
        buffer = aligned_empty(lead + end - first.offset)
        reader.read_into(first.offset, buffer[lead:])
        for ref, chunk in group:
            begin = lead + ref.offset - first.offset
            self._deliver(chunk, buffer[begin : begin + ref.length], _place_of(ref, reader.path))

    def _deliver(self, chunk: _Chunk, value: Bytes, where: str) -> None:
        """Checks a whole value and gives it to the array it belongs to."""
        split = len(value) - (TRAILER if chunk.has_trailer else 0)
        self._check(chunk, value[:split], value[split:], where)
        if chunk.place is not None:
            chunk.place(value[:split])
        elif chunk.into is not None:
            chunk.into[:] = value[: len(chunk.into)]

    def _check(self, chunk: _Chunk, data: Bytes, rest: Bytes, where: str) -> None:
        """Compares a chunk with its checksums; `rest` is padding, if any, and the trailer."""
        padding = len(rest) - (TRAILER if chunk.has_trailer else 0)
        crc = crc32c.crc32c(data.data)
        if padding:
            crc = crc32c.crc32c(rest[:padding].data, crc)
        own = int.from_bytes(rest[padding:].tobytes(), "little") if chunk.has_trailer else crc
        table = self._database.crcs.get(chunk.key, own)
        if crc == own == table:
            return
        expected = f"{table:08x}" if table == own else f"{table:08x} (its own trailer: {own:08x})"
        raise DamagedCheckpointError(
            f"{chunk.leaf}: damaged: {where} have CRC-32C {crc:08x}, saved with {expected};"
            " restore another step"
        )


def _place_of(ref: ValueRef, path: str) -> str:
    return f"bytes {ref.offset} to {ref.offset + ref.length} of {path}"


def _box(index: tuple[int, ...], info: zarr.ZarrInfo) -> Region:
    """The part of the array that a chunk holds."""
    return tuple(
        (i * step, min((i + 1) * step, size))
        for i, step, size in zip(index, info.chunk_shape, info.shape, strict=True)
    )


def _contiguous(
    box: Region, region: Region, chunk_shape: tuple[int, ...], itemsize: int
) -> tuple[int, int] | None:
    """Where a chunk's bytes lie in the region's buffer, if they lie there in one piece.

    They do if the chunk splits one axis, has one element on those before, and covers the region
    on those after. At the array's end its padding then comes last and is not part of the box.
    """
    if any(
        low < first or high > last for (low, high), (first, last) in zip(box, region, strict=True)
    ):
        return None
    split = next((axis for axis, step in enumerate(chunk_shape) if step > 1), len(box))
    for axis in range(split + 1, len(box)):
        low, high = box[axis]
        if (low, high) != region[axis] or high - low != chunk_shape[axis]:
            return None
    start, length, stride = 0, itemsize, itemsize
    for (low, high), (first, last) in zip(reversed(box), reversed(region), strict=True):
        start += (low - first) * stride
        length *= high - low
        stride *= last - first
    return start, start + length


def _copier(
    array: NDArray[Any], region: Region, box: Region, info: zarr.ZarrInfo, dtype: np.dtype[Any]
) -> Callable[[Bytes], None]:
    """Copies the part of a chunk that lies in a region into the region's array."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, region, strict=True)]
    source = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(common, box, strict=True))
    target = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(common, region, strict=True))

    def copy(data: Bytes) -> None:
        array[target] = data.view(dtype).reshape(info.chunk_shape)[source]

    return copy


def _groups(chunks: list[tuple[ValueRef, _Chunk]]) -> Iterator[list[tuple[ValueRef, _Chunk]]]:
    """Chunks that are read in one call: alone if large or placed, else with their neighbours."""
    group: list[tuple[ValueRef, _Chunk]] = []
    for ref, chunk in sorted(chunks, key=lambda item: (item[0].file, item[0].offset)):
        alone = chunk.into is not None or ref.length > _SMALL
        if group:
            first, last = group[0][0], group[-1][0]
            near = ref.file == first.file and ref.offset - (last.offset + last.length) <= _GAP
            if alone or not near or ref.offset + ref.length - first.offset > _GROUP:
                yield group
                group = []
        if alone:
            yield [(ref, chunk)]
        else:
            group.append((ref, chunk))
    if group:
        yield group
