"""Reads arrays in our encodings without TensorStore, from an OCDBT database or plain files.

Chunks are read into memory that JAX on CPU can adopt: small ones that lie side by side in one
call, large ones straight into the array they belong to. Each is compared with its own CRC-32C and
with the one that was saved beside it, in the database's table or in `flax_ckpt.json`, so that an
old block with its own valid checksum is noticed too. Only the chunks that a region needs are read.
"""

import contextlib
import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

import crc32c
import msgspec
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import names
from flax_ckpt.format.arrays import Bytes, Encoding, StoredArray, origin, parse
from flax_ckpt.format.ocdbt import Value, ValueRef
from flax_ckpt.storage import files
from flax_ckpt.storage.database import ALIGNMENT, Database, aligned_empty
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayRead, Arrays, ArrayStore, Parts, Region
from flax_ckpt.storage.tensor_store import TensorStoreStore

_SMALL: Final = 1 << 20  # chunks up to here are read together and share memory
_GROUP: Final = 4 << 20  # how much at most
_TINY: Final = 1 << 10  # chunks up to here are copied out of it
_GAP: Final = 4096  # bytes of no interest that are read to save a call
_THREADS: Final = min(4, os.cpu_count() or 1)
_SHARES: Final = 4 * _THREADS
_ANY: Final = 1 << 40  # bytes of a chunk in a file of its own, checked before
_PENDING: Final[NDArray[Any]] = np.empty(0)


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk to read.

    Attributes:
        leaf, key, ref: whose it is, and where; a file of its own has no `ref`.
        encoding: how it is stored.
        parts: takes the array at `position`, if the chunk is all of one, described by `stored`.
        place: else, what puts the bytes where they belong.
        into: memory that they can be read into, so that there is nothing left to put.
    """

    leaf: str
    key: bytes
    ref: Value | None
    encoding: Encoding
    parts: Parts
    position: int
    stored: StoredArray
    place: Callable[[Bytes], None] | None = None
    into: Bytes | None = None

    @property
    def span(self) -> ValueRef:
        """Where it is in a data file."""
        assert isinstance(self.ref, ValueRef)
        return self.ref


@dataclasses.dataclass
class NativeStore:
    """Arrays of one directory; implements :class:`ArrayStore`.

    Attributes:
        source: an opened database, whose owner closes it, or the checked files of a directory.
        other: reads the arrays in other encodings; None: there must be none.
        most: how many chunks there can be.
        zarr3: whether they are zarr version 3, else 2.
        direct: whether arrays in our encodings are read here although there is another reader.
    """

    source: Database | Record
    other: TensorStoreStore | None
    most: int
    zarr3: bool
    direct: bool = False

    def __post_init__(self) -> None:
        self._directory = self.source.directory
        self._database = self.source if isinstance(self.source, Database) else None
        self._crcs = self._database.crcs if self._database else dict[bytes, int]()
        self._stored: dict[str, StoredArray] = {}
        self._known: dict[bytes, tuple[int, StoredArray]] = {}  # most descriptions are alike

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """See :class:`ArrayStore`."""
        found: dict[str, StoredArray] = {}
        known, key_of, crcs = self._known, Encoding(self.zarr3).metadata_key, self._crcs
        values = self._database.values if self._database else {}
        for name in names:
            data = values.get(key := key_of(name))
            if not isinstance(data, bytes):
                data = self._value(key)
            if (parsed := known.get(data)) is None:
                parsed = known[data] = crc32c.crc32c(data), self._parse(name, data)
            crc, found[name] = parsed
            if crc != crcs.get(key, crc):
                why = f"the description of the array {name!r} is not the one that was saved"
                raise _damaged(self._directory, why)
        self._stored |= found
        return found

    def _value(self, key: bytes, most: int = files.MAX_BYTES) -> bytes:
        if isinstance(self.source, Database):
            return self.source.read(key, most)
        name = key.decode() if self.source.native else key.decode().replace("\\", "/")  # as Orbax
        return self.source.read(name, most)

    def _parse(self, name: str, data: bytes) -> StoredArray:
        try:
            stored = parse(data, zarr3=self.zarr3)
        except FormatError as error:
            raise FormatError(f"{self._directory}: the array {name!r}: {error}") from error
        if stored.encoding is None and self.other is None:
            key = Encoding(self.zarr3).metadata_key(name)
            raise FormatError(f"{self._named(key)}: these codecs are not those we write")
        return stored

    def read_arrays(self, reads: Sequence[ArrayRead]) -> Arrays:
        """See :class:`ArrayStore`."""
        results: Arrays = [[] for _ in reads]
        chunks: list[_Chunk] = []
        foreign: list[int] = []
        for number, read in enumerate(reads):
            stored = self._stored.get(read.name) or self.describe([read.name])[read.name]
            encoding = stored.encoding
            if encoding is None or (self.other and (encoding.compressed or not self.direct)):
                self._check_count(read.leaf, stored.shape, stored.chunk_shape)
                self._check_memory(read.leaf, stored)
                foreign.append(number)
                continue
            for region in read.regions:
                chunks += self._plan(read, stored, encoding, region, results[number])
        self._read_chunks(chunks)
        if foreign and self.other:
            if self._database:
                self._database.check_files()
            others = self.other.read_arrays([reads[number] for number in foreign])
            for number, parts in zip(foreign, others, strict=True):
                results[number] = parts
        return results

    def _plan(
        self, read: ArrayRead, stored: StoredArray, encoding: Encoding, region: Region, parts: Parts
    ) -> Iterator[_Chunk]:
        """The chunks that a region needs; the region's array is added to `parts`."""
        shape, dtype, chunk_shape, _ = stored
        wanted = tuple([stop - start for start, stop in region])
        nbytes = math.prod(chunk_shape) * dtype.itemsize
        plain = self._database is not None and not encoding.compressed
        position = len(parts)
        if plain and chunk_shape == shape == wanted and nbytes <= _SMALL:
            parts.append(_PENDING)
            key = encoding.chunk_key(read.name, origin(len(shape)))
            ref = self._find(read.leaf, key, *encoding.sizes(nbytes))
            yield _Chunk(read.leaf, key, ref, encoding, parts, position, stored)
            return
        self._check_count(read.leaf, wanted, chunk_shape)
        grid = [
            range(start // step, -(-stop // step) if stop > start else 0)
            for (start, stop), step in zip(region, chunk_shape, strict=True)
        ]
        found: list[tuple[tuple[int, ...], bytes, Value | None]] = []
        for index in itertools.product(*grid):  # all are there before memory is asked for
            key = encoding.chunk_key(read.name, index)
            found.append((index, key, self._find(read.leaf, key, *encoding.sizes(nbytes))))
        array = aligned_empty(math.prod(wanted) * dtype.itemsize).view(dtype).reshape(wanted)
        parts.append(array)
        for index, key, ref in found:
            copy, into = _destination(array, region, chunk_shape, index)
            into = into if plain else None
            yield _Chunk(read.leaf, key, ref, encoding, parts, position, stored, copy, into)

    def _named(self, key: bytes) -> str:
        return f"{key.decode()!r} in {self._directory}"

    def _check_count(self, leaf: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
        """Checks that there are as many values as the array has chunks, before they are listed."""
        count = math.prod(-(-n // step) for n, step in zip(shape, chunk_shape, strict=True))
        if count > self.most:
            why = f"some of its {count} chunks are missing in {self._directory}"
            raise DamagedCheckpointError(f"{leaf}: {why}")

    def _check_memory(self, leaf: str, stored: StoredArray) -> None:
        """Checks that there is memory for a chunk: TensorStore ends the process if it gets none."""
        nbytes = math.prod(stored.chunk_shape) * stored.dtype.itemsize
        try:
            np.empty(nbytes, np.uint8)
        except (MemoryError, ValueError) as error:
            why = f"there is no memory for a chunk of {nbytes} bytes in {self._directory}"
            raise DamagedCheckpointError(f"{leaf}: {why}") from error

    def _find(self, leaf: str, key: bytes, least: int, most: int) -> Value | None:
        """Where a chunk is; checks that it has as many bytes as expected, and that they are there.

        One in a file of its own has no `Value`.
        """
        ref: Value | None = None
        if isinstance(self.source, Record):
            length = self.source.size(key.decode())
        else:
            ref = self.source.values.get(key)
            length = ref.length if isinstance(ref, ValueRef) else None if ref is None else len(ref)
        if length is None or not least <= length <= most:
            size = least if least == most else f"{least} to {most}"
            found = "is missing" if length is None else f"has {length} bytes, expected {size}"
            raise _damaged(leaf, f"its chunk {self._named(key)} {found}")
        if length > _SMALL and isinstance(ref, ValueRef) and self._database:
            self._database.reader(ref.file).check(ref.offset, length)
        return ref

    def _read_chunks(self, chunks: list[_Chunk]) -> None:
        placed = [chunk for chunk in chunks if isinstance(chunk.ref, ValueRef)]
        placed.sort(key=operator.attrgetter("ref"))
        others = [chunk for chunk in chunks if not isinstance(chunk.ref, ValueRef)]
        shares = filter(None, [others[i::_SHARES] for i in range(_SHARES)])
        files.in_threads(_THREADS, self._read_values, shares)
        files.in_threads(_THREADS, self._read_group, _groups(placed))

    def _read_values(self, chunks: list[_Chunk]) -> None:
        """Reads chunks that lie in an index node, or in files of their own."""
        for chunk in chunks:
            try:
                value = self._value(chunk.key, _ANY)
            except DamagedCheckpointError as error:
                raise DamagedCheckpointError(f"{chunk.leaf}: {error}") from error
            self._deliver(chunk, np.frombuffer(bytearray(value), np.uint8))

    def _read_group(self, group: list[_Chunk]) -> None:
        assert self._database is not None
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
        split = len(value) - chunk.encoding.trailer
        data = value[:split]
        self._check(chunk, data, value[split:])
        if split <= _TINY:  # a step counter that is kept must not keep what was read with it
            data = data.copy()
        stored = chunk.stored
        if chunk.place is None:
            chunk.parts[chunk.position] = data.view(stored.dtype).reshape(stored.shape)
        else:
            what = f"{chunk.leaf}: {self._named(chunk.key)}"
            nbytes = math.prod(stored.chunk_shape) * stored.dtype.itemsize
            chunk.place(chunk.encoding.decode(data, nbytes, what))

    def _check(self, chunk: _Chunk, data: Bytes, rest: Bytes) -> None:
        """Compares a chunk with its checksums; `rest` is padding, if any, and the trailer."""
        padding = len(rest) - chunk.encoding.trailer
        crc = crc32c.crc32c(rest[:padding].data, crc32c.crc32c(data.data))
        own = int.from_bytes(rest[padding:].tobytes(), "little") if len(rest) > padding else crc
        table = self._crcs.get(chunk.key, own)
        if crc == own == table:
            return
        where = self._named(chunk.key)
        if isinstance(ref := chunk.ref, ValueRef):
            path = os.path.join(self._directory, ref.file)
            where = f"bytes {ref.offset} to {ref.offset + ref.length} of {path}"
        expected = f"{table:08x}" if table == own else f"{table:08x} (its own trailer: {own:08x})"
        why = f"damaged: {where} have CRC-32C {crc:08x}, saved with {expected}"
        raise _damaged(chunk.leaf, why)


def _damaged(what: str, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{what}: {why}; restore another step")


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


def _groups(chunks: list[_Chunk]) -> list[list[_Chunk]]:
    """Sorted chunks that are read in one call: alone if large or placed, else with neighbours."""
    groups: list[list[_Chunk]] = []
    file, end, most = "", 0, 0  # of the last group: where it ends, and may end
    for chunk in chunks:
        ref = chunk.span
        alone = chunk.into is not None or ref.length > _SMALL
        beyond = ref.offset > end + _GAP or ref.offset + ref.length > most
        if alone or beyond or ref.file != file:
            groups.append([])
            file, most = ref.file, -1 if alone else ref.offset + _GROUP
        groups[-1].append(chunk)
        end = ref.offset + ref.length
    return groups


@contextlib.contextmanager
def open_store(
    record: Record, *, ocdbt: bool | None, zarr3: bool, fill_missing: bool = False
) -> Generator[ArrayStore]:
    """The arrays of a directory.

    A foreign database's index is decoded here first, which checks that no path in it leads out of
    the directory before TensorStore sees it.

    Args:
        record: reads the directory's files.
        ocdbt: what `_METADATA` says; None: look.
        zarr3: likewise.
        fill_missing: chunks that are missing are zeros, unless we wrote the checkpoint.
    """
    if ocdbt is None:
        ocdbt = os.path.isfile(os.path.join(record.directory, names.MANIFEST))
    where = record.directory
    other = TensorStoreStore(where, ocdbt=ocdbt, zarr3=zarr3, fill_missing=fill_missing)
    if not ocdbt:
        most = files.refuse_links(where)
        yield NativeStore(record, None if record.native else other, most, zarr3)
        return
    checked = record.native and record.lists(names.CHUNK_TABLE)
    with Database(record, checked=checked) as database:
        most = 1 << 32 if fill_missing and not checked else len(database.values)
        direct = zarr3 and not fill_missing
        yield NativeStore(database, None if checked else other, most, zarr3, direct)
