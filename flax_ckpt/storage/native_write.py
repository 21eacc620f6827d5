"""Writes arrays, without TensorStore, as one OCDBT database or as files; `native_read` reads them.

A database is one data file with all chunks of this process, then the index, then the manifest,
then the table of checksums. When several processes save, each makes a database of its own in
`ocdbt.process_<n>/` and the primary merges their indices; the data stays where it is.

Files are one for each chunk, `w/zarr.json`, `w/c/0/0`, …; each process writes those that it has.
`flax_ckpt.json` has the checksums of these, as of all that no table vouches for.
"""

import itertools
import operator
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import crc32c
import msgspec
import numpy as np

from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays as zarr
from flax_ckpt.format import names, ocdbt
from flax_ckpt.storage import files
from flax_ckpt.storage.database import Database, DataFileWriter
from flax_ckpt.storage.hosts import Hosts
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite

# key, value or where it is, CRC-32C of the value (of a chunk: without its trailer)
_Row = tuple[bytes, ocdbt.Value, int]
# What else may lie in the directory of a tree; `checkpoint` is a file of Orbax's first format.
_TAKEN: Final = (
    *(names.TREE_METADATA, names.SHARDING, names.STRINGS, names.ARRAY_METADATAS),
    *(names.MANIFEST, names.CHUNK_TABLE, "checkpoint"),
)


def write_arrays(
    directory: str, arrays: Sequence[ArrayWrite], hosts: Hosts, layout: ArrayLayout
) -> None:
    """Writes the arrays of a tree; nothing is synced, the commit does that.

    Args:
        directory: of the PyTree; exists.
        arrays: all arrays of the tree, in every process the same, with this process's shards.
        hosts: the processes that write together.
        layout: where they go, how they are encoded, and the size of data files.
    """
    by_name = sorted(arrays, key=operator.attrgetter("name"))
    values = _encoded(by_name, layout.encoding, primary=hosts.is_primary)
    if not layout.ocdbt:
        for key, head, tail, _ in values:
            path = os.path.join(directory, key.decode())
            files.mkdirs(os.path.dirname(path))
            files.write(path, head, tail)
        return
    own = os.path.join(directory, _process_dir(hosts.index)) if hosts.several else directory
    rows: list[_Row] = []
    with DataFileWriter(own, layout.file_size) as out:
        for key, head, tail, crc in values:
            value = head if isinstance(head, bytes) else out.append_chunk(head, tail)
            rows.append((key, value, crc))
        _write_index(out, rows)
    if hosts.several:
        hosts.barrier(f"{os.path.basename(directory)} written")
        if hosts.is_primary:
            _merge(directory, [_process_dir(index) for index in hosts.active])


def _process_dir(index: int) -> str:
    return f"ocdbt.process_{index}"


def _write_index(out: DataFileWriter, rows: list[_Row]) -> None:
    """Finishes a database: the index goes to the end of the data file."""
    rows.sort(key=operator.itemgetter(0))
    entries = [row[:2] for row in rows]
    blobs, root = ocdbt.encode_nodes(entries, file=out.file, offset=out.offset)
    for blob in blobs:
        out.append(blob)
    out.flush()
    manifest = ocdbt.encode_manifest(root, uuid=uuid.uuid4().bytes, commit_time_ns=time.time_ns())
    files.write(os.path.join(out.directory, names.MANIFEST), manifest)
    table = ocdbt.encode_table([key for key, _ in entries], [crc for *_, crc in rows])
    files.write(os.path.join(out.directory, names.CHUNK_TABLE), table)


def _rows(directory: str, folder: str = "") -> list[_Row]:
    """All of a finished database, which lies in this folder of another."""
    rows: list[_Row] = []
    with Database(Record(directory), checked=True) as database:
        for key, value in database.values.items():
            if not isinstance(value, bytes):
                value = msgspec.structs.replace(value, file=folder + value.file)
            rows.append((key, value, database.crcs[key]))
    return rows


def _merge(directory: str, folders: Sequence[str]) -> None:
    rows: list[_Row] = []
    for name in folders:
        own = os.path.join(directory, name)
        rows += _rows(own, f"{name}/")
        for index in (names.MANIFEST, names.CHUNK_TABLE):  # only the data is needed from now on
            files.unlink(os.path.join(own, index))
    with DataFileWriter(directory) as out:
        _write_index(out, rows)


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
            files.mkdirs(os.path.dirname(link))
            files.link(os.path.join(source, file), link)
    with DataFileWriter(directory) as out:
        _write_index(out, rows)


def _encoded(
    arrays: Iterable[ArrayWrite], encoding: zarr.Encoding, *, primary: bool
) -> Iterator[tuple[bytes, bytes | memoryview, bytes, int]]:
    """Key, value and checksum of all that this process writes.

    A value is the description of an array; or a chunk, and what follows it: padding, and the
    CRC-32C if the encoding has one.
    """
    for array in arrays:
        if primary:
            text = encoding.metadata(array.spec)
            yield encoding.metadata_key(array.name), text, b"", crc32c.crc32c(text)
        for index, data, padding in _chunks(array) if primary or array.spread else ():
            head, padding = encoding.encode(data, padding)
            crc = crc32c.crc32c(bytes(padding), crc32c.crc32c(head.data))
            tail = bytes(padding) + crc.to_bytes(4, "little")[: encoding.trailer]
            yield encoding.chunk_key(array.name, index), head.data, tail, crc


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


def check_names(wanted: Sequence[str]) -> None:
    """Checks that each array can have a directory of its own, named as it.

    Raises:
        UnsupportedLeafError: lists the names that cannot be directories, or lie in another's.
    """
    found = set(wanted)
    refused = [f"  {name!r}: {why}" for name in wanted if (why := _refusal(name, found))]
    if refused:
        raise UnsupportedLeafError(
            "these arrays cannot be stored as files named after their keys:\n"
            + "\n".join(refused)
            + "\nRename the keys, or leave array.saving.use_ocdbt as it is"
        )


def _refusal(name: str, others: set[str]) -> str:
    parts = name.split("/")
    if not zarr.prefix(name):
        return "" if len(others) == 1 else "without a name only a tree of one array can be stored"
    if parts[0] in _TAKEN:
        return f"{parts[0]} is a file of the format"
    if "\0" in name or {"", ".", ".."} & set(parts):
        return "is no path of a directory below the tree's"
    above = next((o for i in range(1, len(parts)) if (o := "/".join(parts[:i])) in others), None)
    return f"lies in the directory of the array {above!r}" if above else ""
