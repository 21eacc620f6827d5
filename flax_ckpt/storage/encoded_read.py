"""Reads arrays that we wrote in other encodings than the default: compressed, zarr 2, plain files.

Each value is compared with the checksum that was saved beside it, in the database's table or in
`flax_ckpt.json`, before it is decoded. Only the chunks that a region needs are read.
"""

import concurrent.futures
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import crc32c
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format.arrays import numpy_dtype
from flax_ckpt.format.encoding import Described, Encoding, parse
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.datafile import aligned_empty
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayRead, Region, StoredArray

_THREADS: Final = min(4, os.cpu_count() or 1)

# The value of a key, checked; the second argument is how many bytes of it are its own CRC-32C.
Fetch = Callable[[bytes, int], bytes]


def from_files(record: Record) -> Fetch:
    """Values that are files of a directory."""
    return lambda key, _: record.read(key.decode())


def from_database(database: Database) -> Fetch:
    """Values of a database that has a table of checksums."""

    def fetch(key: bytes, trailer: int) -> bytes:
        value = database.read(key)
        found = crc32c.crc32c(memoryview(value)[: len(value) - trailer])
        if found != (expected := database.crcs[key]):
            raise DamagedCheckpointError(
                f"{database.directory}: damaged: {key.decode()!r} has CRC-32C {found:08x}, saved"
                f" with {expected:08x}; restore another step"
            )
        return value

    return fetch


class EncodedStore:
    """Arrays by their encodings; implements :class:`ArrayStore`.

    Args:
        directory: where they are, for error messages.
        fetch: the checked value of a key.
        zarr3: whether they are zarr version 3, else 2.
    """

    def __init__(self, directory: str, fetch: Fetch, *, zarr3: bool) -> None:
        self._directory = directory
        self._fetch = fetch
        self._zarr3 = zarr3
        self._found: dict[str, Described] = {}

    def _described(self, name: str) -> Described:
        if name not in self._found:
            data = self._fetch(Encoding(self._zarr3).metadata_key(name), 0)
            what = f"{self._directory}: the array {name!r}"
            self._found[name] = parse(data, zarr3=self._zarr3, what=what)
        return self._found[name]

    def describe(self, names: Sequence[str]) -> dict[str, StoredArray]:
        """See :class:`ArrayStore`."""
        specs = {name: self._described(name).spec for name in names}
        return {n: StoredArray(spec.shape, numpy_dtype(spec.dtype)) for n, spec in specs.items()}

    def read_arrays(self, reads: Sequence[ArrayRead]) -> list[list[NDArray[Any]]]:
        """See :class:`ArrayStore`."""
        results: list[list[NDArray[Any]]] = []
        work: list[Callable[[], None]] = []
        for read in reads:
            dtype = numpy_dtype(self._described(read.name).spec.dtype)
            parts: list[NDArray[Any]] = []
            for region in read.regions:
                shape = tuple([stop - start for start, stop in region])
                memory = aligned_empty(math.prod(shape) * dtype.itemsize)
                parts.append(memory.view(dtype).reshape(shape))
                work += self._plan(read, region, parts[-1])
            results.append(parts)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(fill) for fill in work]:
                done.result()
        return results

    def _plan(
        self, read: ArrayRead, region: Region, array: NDArray[Any]
    ) -> Iterator[Callable[[], None]]:
        """One piece of work for each chunk that a region needs; it fills its part of `array`."""
        steps = self._described(read.name).spec.chunk_shape
        spans = [
            range(start // step, -(-stop // step) if stop > start else start // step)
            for (start, stop), step in zip(region, steps, strict=True)
        ]
        for index in itertools.product(*spans):
            yield lambda index=index: self._fill(read, index, region, array)

    def _fill(
        self, read: ArrayRead, index: tuple[int, ...], region: Region, array: NDArray[Any]
    ) -> None:
        spec, encoding = self._described(read.name)
        key = encoding.chunk_key(read.name, index)
        try:
            value = self._fetch(key, encoding.trailer)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{read.leaf}: {error}") from error
        what = f"{read.leaf}: {key.decode()!r} in {self._directory}"
        data = encoding.decode(value, spec.chunk_nbytes, what)
        chunk = data.view(array.dtype).reshape(spec.chunk_shape)
        source: list[slice] = []
        target: list[slice] = []
        for i, step, (start, stop) in zip(index, spec.chunk_shape, region, strict=True):
            low, high = max(i * step, start), min((i + 1) * step, stop)
            source.append(slice(low - i * step, high - i * step))
            target.append(slice(low - start, high - start))
        array[..., *target] = chunk[..., *source]  # `...` for rank 0
