"""Writes arrays as an OCDBT database, without TensorStore; `native_read` reads them.

A write is one data file with all chunks of this process, then the database's index, then its
manifest, then the table of checksums. When several processes save, each makes a database of its
own in `ocdbt.process_<n>/` and the primary merges their indices; the data stays where it is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence

import crc32c
import numpy as np

from flax_ckpt.format import arrays as zarr
from flax_ckpt.format import chunktable, names, ocdbt
from flax_ckpt.storage import files
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.datafile import TRAILER, Bytes, DataFileWriter
from flax_ckpt.storage.hosts import Hosts
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayWrite

# key, value or where it is, CRC-32C of the value (of a chunk: without its trailer)
_Row = tuple[bytes, ocdbt.Value, int]


def write_arrays(directory: str, arrays: Sequence[ArrayWrite], hosts: Hosts) -> None:
    """Writes arrays as one database; nothing is synced, the commit does that.

    Args:
        directory: of the PyTree; exists.
        arrays: all arrays of the tree, in every process the same, with this process's shards.
        hosts: the processes that write together.
    """
    if not hosts.several:
        _write_database(directory, arrays, primary=True)
        return
    own = os.path.join(directory, _process_dir(hosts.index))
    os.makedirs(own)
    _write_database(own, arrays, primary=hosts.is_primary)
    hosts.barrier(f"{os.path.basename(directory)} written")
    if hosts.is_primary:
        _merge(directory, hosts.active)


def _process_dir(index: int) -> str:
    return f"ocdbt.process_{index}"


def _write_database(directory: str, arrays: Sequence[ArrayWrite], *, primary: bool) -> None:
    rows: list[_Row] = []
    with _new_data_file(directory) as (file, out):
        for array in sorted(arrays, key=lambda array: array.name):
            if primary:
                spec = array.spec.to_zarr3_json()
                rows.append((zarr.zarr_key(array.name), spec, crc32c.crc32c(spec)))
            for index, data, padding in _chunks(array) if primary or array.spread else ():
                offset, crc = out.append_chunk(data, padding)
                ref = ocdbt.ValueRef(file, offset, array.spec.chunk_nbytes + TRAILER)
                rows.append((zarr.chunk_key(array.name, index), ref, crc))
        _write_index(directory, file, out, rows)


@contextlib.contextmanager
def _new_data_file(directory: str) -> Generator[tuple[str, DataFileWriter]]:
    file = f"{names.DATA_DIR}/{uuid.uuid4().hex}"
    os.makedirs(os.path.join(directory, names.DATA_DIR), exist_ok=True)
    with DataFileWriter(os.path.join(directory, file)) as out:
        yield file, out


def _write_index(directory: str, file: str, out: DataFileWriter, rows: list[_Row]) -> None:
    rows.sort(key=lambda row: row[0])
    entries = [(key, value) for key, value, _ in rows]
    blobs, root = ocdbt.encode_nodes(entries, file=file, offset=out.offset)
    for blob in blobs:
        out.append(blob)
    manifest = ocdbt.encode_manifest(root, uuid=uuid.uuid4().bytes, commit_time_ns=time.time_ns())
    files.write(os.path.join(directory, names.MANIFEST), manifest)
    table = chunktable.encode_table([key for key, _ in entries], [crc for *_, crc in rows])
    files.write(os.path.join(directory, names.CHUNK_TABLE), table)


def _merge(directory: str, processes: Iterable[int]) -> None:
    rows: list[_Row] = []
    for process in processes:
        name = _process_dir(process)
        with Database(Record(os.path.join(directory, name)), checked=True) as database:
            rows += [
                (key, _moved(value, name), database.crcs[key])
                for key, value in database.values.items()
            ]
        for index in (names.MANIFEST, names.CHUNK_TABLE):  # only the data is needed from now on
            os.unlink(os.path.join(directory, name, index))
    with _new_data_file(directory) as (file, out):
        _write_index(directory, file, out, rows)


def _moved(value: ocdbt.Value, into: str) -> ocdbt.Value:
    if isinstance(value, bytes):
        return value
    return ocdbt.ValueRef(f"{into}/{value.file}", value.offset, value.length)


def _chunks(array: ArrayWrite) -> Iterator[tuple[tuple[int, ...], Bytes, int]]:
    """Index, bytes and padding of each chunk that this process writes.

    A chunk is contiguous in its shard: leading axes of 1, one axis that is split, whole axes. So
    a chunk's bytes are a slice of the shard's; only along the split axis the last may be short.
    """
    chunk = array.spec.chunk_shape
    size = array.spec.chunk_nbytes
    for start, data in array.shards:
        if not data.size:
            continue
        flat: Bytes = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        first = [begin // step for begin, step in zip(start, chunk, strict=True)]
        counts = [-(-extent // step) for extent, step in zip(data.shape, chunk, strict=True)]
        position = 0
        for offset in itertools.product(*map(range, counts)):
            extents = [
                min(step, extent - i * step)
                for i, step, extent in zip(offset, chunk, data.shape, strict=True)
            ]
            length = math.prod(extents) * data.dtype.itemsize
            index = tuple(a + b for a, b in zip(first, offset, strict=True))
            yield index, flat[position : position + length], size - length
            position += length
