"""Writes arrays as an OCDBT database, without TensorStore; `native_read` reads them.

A write is one data file with all chunks of this process, then the database's index, then its
manifest, then the table of checksums. When several processes save, each makes a database of its
own in `ocdbt.process_<n>/` and the primary merges their indices; the data stays where it is.
"""

import itertools
import operator
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence

import crc32c
import msgspec
import numpy as np

from flax_ckpt.format import arrays as zarr
from flax_ckpt.format import names, ocdbt
from flax_ckpt.storage import files
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.datafile import DataFileWriter
from flax_ckpt.storage.hosts import Hosts
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite

# key, value or where it is, CRC-32C of the value (of a chunk: without its trailer)
_Row = tuple[bytes, ocdbt.Value, int]


def write_arrays(
    directory: str, arrays: Sequence[ArrayWrite], hosts: Hosts, layout: ArrayLayout
) -> None:
    """Writes arrays as one database; nothing is synced, the commit does that.

    Args:
        directory: of the PyTree; exists.
        arrays: all arrays of the tree, in every process the same, with this process's shards.
        hosts: the processes that write together.
        layout: how the arrays are encoded, and the size of data files.
    """
    own = os.path.join(directory, _process_dir(hosts.index)) if hosts.several else directory
    _write_database(own, arrays, layout, primary=hosts.is_primary)
    if hosts.several:
        hosts.barrier(f"{os.path.basename(directory)} written")
        if hosts.is_primary:
            _merge(directory, hosts.active)


def _process_dir(index: int) -> str:
    return f"ocdbt.process_{index}"


def _write_database(
    directory: str, arrays: Sequence[ArrayWrite], layout: ArrayLayout, *, primary: bool
) -> None:
    rows: list[_Row] = []
    by_name = sorted(arrays, key=operator.attrgetter("name"))
    with DataFileWriter(directory, layout.file_size) as out:
        for key, data, padding in encoded(by_name, layout.encoding, primary=primary):
            if isinstance(data, bytes):
                rows.append((key, data, crc32c.crc32c(data)))
                continue
            offset, crc = out.append_chunk(data, padding)
            length = len(data) + padding + layout.encoding.trailer
            rows.append((key, ocdbt.ValueRef(out.file, offset, length), crc))
        _write_index(directory, out, rows)


def _write_index(directory: str, out: DataFileWriter, rows: list[_Row]) -> None:
    rows.sort(key=operator.itemgetter(0))
    entries = [row[:2] for row in rows]
    blobs, root = ocdbt.encode_nodes(entries, file=out.file, offset=out.offset)
    for blob in blobs:
        out.append(blob)
    manifest = ocdbt.encode_manifest(root, uuid=uuid.uuid4().bytes, commit_time_ns=time.time_ns())
    files.write(os.path.join(directory, names.MANIFEST), manifest)
    table = ocdbt.encode_table([key for key, _ in entries], [crc for *_, crc in rows])
    files.write(os.path.join(directory, names.CHUNK_TABLE), table)


def _rows(directory: str, folder: str = "") -> list[_Row]:
    """All of a finished database, which lies in this folder of another."""
    rows: list[_Row] = []
    with Database(Record(directory), checked=True) as database:
        for key, value in database.values.items():
            if not isinstance(value, bytes):
                value = msgspec.structs.replace(value, file=folder + value.file)
            rows.append((key, value, database.crcs[key]))
    return rows


def _merge(directory: str, processes: Iterable[int]) -> None:
    rows: list[_Row] = []
    for name in map(_process_dir, processes):
        own = os.path.join(directory, name)
        rows += _rows(own, f"{name}/")
        for index in (names.MANIFEST, names.CHUNK_TABLE):  # only the data is needed from now on
            os.unlink(os.path.join(own, index))
    with DataFileWriter(directory) as out:
        _write_index(directory, out, rows)


def unite(directory: str, sources: Iterable[str]) -> None:
    """Writes one database for the data of several; the data files are hard-linked, not copied.

    Args:
        directory: of the new database; exists.
        sources: directories of the others, whose keys are disjoint; they stay as they are.
    """
    rows: list[_Row] = []
    for source in sources:
        own = _rows(source)
        rows += own
        for file in {value.file for _, value, _ in own if not isinstance(value, bytes)}:
            link = os.path.join(directory, file)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.link(os.path.join(source, file), link)
    with DataFileWriter(directory) as out:
        _write_index(directory, out, rows)


def encoded(
    arrays: Iterable[ArrayWrite], encoding: zarr.Encoding, *, primary: bool
) -> Iterator[tuple[bytes, bytes | zarr.Bytes, int]]:
    """Key and value of all that this process writes.

    A value is the description of an array, or a chunk without its CRC-32C and how many zero bytes
    follow it.
    """
    for array in arrays:
        if primary:
            yield encoding.metadata_key(array.name), encoding.metadata(array.spec), 0
        for index, data, padding in _chunks(array) if primary or array.spread else ():
            yield encoding.chunk_key(array.name, index), *encoding.encode(data, padding)


def _chunks(array: ArrayWrite) -> Iterator[tuple[tuple[int, ...], zarr.Bytes, int]]:
    """Index, bytes and padding of each chunk that this process writes.

    A chunk mostly is contiguous in its shard: leading axes of 1, one axis that is split, whole
    axes. Then nothing is copied, and along the split axis the last chunk may be short. One that
    is split along other axes divides the shard, and is copied.
    """
    chunk = array.spec.chunk_shape
    dtype = zarr.numpy_dtype(array.spec.dtype)
    for part in array.shards:
        if not part.data.size:
            continue
        with np.errstate(all="ignore"):  # where the user wants a narrower dtype on disk
            shard = np.asarray(part.data, dtype, order="C")
        corner = tuple([low // step for low, step in zip(part.start, chunk, strict=True)])
        if shard.shape == chunk:
            yield corner, shard.reshape(-1).view(np.uint8), 0
            continue
        counts = [-(-extent // step) for extent, step in zip(shard.shape, chunk, strict=True)]
        for place in itertools.product(*map(range, counts)):
            box = [slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True)]
            piece: zarr.Bytes = np.ascontiguousarray(shard[..., *box]).reshape(-1).view(np.uint8)
            index = tuple(low + i for low, i in zip(corner, place, strict=True))
            yield index, piece, array.spec.chunk_nbytes - len(piece)
