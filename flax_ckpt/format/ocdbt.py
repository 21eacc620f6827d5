"""OCDBT databases: sorted keys with values, stored inline or somewhere in a data file.

A database is a directory with `manifest.ocdbt`, which says where the root of a B+tree is, and data
files. Written from TensorStore's public description of the format (`kvstore/ocdbt/index.rst`).
We write uncompressed nodes and read any. No I/O here, callers pass bytes in and out:

    blobs, root = encode_nodes(entries, file=file, offset=size)      # append blobs to `file`
    manifest = encode_manifest(root, uuid=uuid, commit_time_ns=now)  # write as manifest.ocdbt
    read_tree(decode_manifest(manifest), fetch) == entries

Beside it we write the checksum table, the CRC-32C of every value in key order. Each chunk carries
its own CRC, which a stale or swapped block satisfies as well; the table says which bytes belong
under which key. A format of this package:

    8 bytes magic · u32le version 1 · u64le count · u32le CRC-32C of the keys ·
    u32le CRC-32C of each value (of a chunk: of its payload, without the CRC that is stored
    with it) · u32le CRC-32C of all bytes before it

The CRC of the keys is taken over the u32le lengths of all keys, then all keys, in order.
"""

import itertools
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import crc32c
import msgspec
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, DuplicateNameError, FormatError
from flax_ckpt.format import wire

MANIFEST_MAGIC: Final = b"\x0c\xdb\x3a\x2a"
NODE_MAGIC: Final = b"\x0c\xdb\x20\xde"
# What Orbax configures. Readers ignore it; a later writer of the database follows it: manifest kind
# 0 (single), inline values up to 1 KiB, decoded nodes up to 100 MB, arity 2**4, no compression.
_CONFIG: Final = (0, 1024, 100_000_000, 4, 0)
_MAX_INLINE_BYTES: Final = 1 << 20
# Nodes are read whole, so smaller ones cost less to change and larger ones less to list.
_LEAF_BYTES: Final = 8 << 20
# Most memory that reading a tree may take, roughly: a tree may name one node many times, so that
# a small file could describe a result without end. A node and a row in it count for this much.
_MAX_TREE_BYTES: Final = 2 << 30
_NODE_COST: Final = 4096
_ROW_COST: Final = 128


class NumberedManifestError(FormatError):
    """The database keeps its versions in numbered manifests."""


class ValueRef(msgspec.Struct, frozen=True, order=True, gc=False):
    """A value that is stored outside of the tree.

    Attributes:
        file: data file, relative to the database directory: `d/<32 hex digits>`.
        offset: its first byte in that file.
        length: its size in bytes.
    """

    file: str
    offset: int
    length: int


Value: TypeAlias = bytes | ValueRef
Entry: TypeAlias = tuple[bytes, Value]
_Files: TypeAlias = list[tuple[str, str]]


class NodeRef(NamedTuple):
    """Where a node is, and what its parent (for a root: the manifest) says about it.

    Attributes:
        height: 0 for a leaf.
        file: data file, relative to the database directory; "" if the database is empty.
        offset: its first byte in that file.
        length: its size in bytes.
        prefix: start of all keys below it, which the nodes leave out.
        base: what the paths in it are relative to; "" or a path that ends in "/".
        counts: of a root: all keys, bytes of nodes and bytes of out-of-line values of its tree.
    """

    height: int
    file: str
    offset: int
    length: int
    prefix: bytes = b""
    base: str = ""
    counts: tuple[int, int, int] = (0, 0, 0)

    def __str__(self) -> str:
        return f"B+tree node {self.file}[{self.offset}:{self.offset + self.length}]"


EMPTY_ROOT: Final = NodeRef(0, "", wire.MAX_UINT64, wire.MAX_UINT64)


def encode_nodes(
    entries: Sequence[Entry], *, file: str, offset: int
) -> tuple[list[bytes], NodeRef]:
    """The B+tree of a database: leaves of about 8 MB, and a root above them if there are several.

    Args:
        entries: (key, value), keys strictly increasing.
        file: data file that the blobs will be appended to, relative to the database directory.
        offset: size of that file in bytes before the first blob.

    Returns:
        The blobs in file order, to be written without a gap, and the root for `encode_manifest`.

    Raises:
        DuplicateNameError: a key occurs twice.
        FormatError: keys out of order; a key above 65,535 bytes; an inline value above 1 MiB;
            a path or a range that the format cannot hold.
    """
    _check(entries, file)
    if not entries:
        return [], EMPTY_ROOT
    ends = np.cumsum([16 + len(k) + (len(v) if isinstance(v, bytes) else 0) for k, v in entries])
    total = int(ends[-1])
    groups = (ends - 1) * -(-total // _LEAF_BYTES) // total
    cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(entries)]
    blobs: list[bytes] = []
    rows: list[tuple[int, int, int, int, int]] = []  # offset, length, then the counts of a leaf
    for start, end in itertools.pairwise(cuts):
        blob, outside = _leaf(entries[start:end])
        rows.append((offset, len(blob), end - start, len(blob), outside))
        blobs.append(blob)
        offset += len(blob)
    if height := int(len(rows) > 1):
        first_keys = wire.encode_strings([entries[start][0] for start in cuts[:-1]], marked=True)
        columns = map(wire.encode_varints, zip(*rows, strict=True))
        head = (b"\1", wire.encode_files([file]), first_keys, bytes(len(rows)))
        blobs.append(wire.encode_frame(NODE_MAGIC, *head, *columns))
        rows.append((offset, len(blobs[-1]), 0, len(blobs[-1]), 0))
    _, _, keys, nodes, outside = map(sum, zip(*rows, strict=True))
    return blobs, NodeRef(height, file, *rows[-1][:2], counts=(keys, nodes, outside))


def _check(entries: Sequence[Entry], file: str) -> None:
    for (last, _), (key, _) in itertools.pairwise(entries):
        if last == key:
            raise DuplicateNameError(f"key {key[:80]!r} occurs twice in one database")
        if last > key:
            raise FormatError(f"key {key[:80]!r}: found after {last[:80]!r}, expected before it")
    files = {file}
    for key, value in entries:
        if len(key) > wire.MAX_KEY:
            raise FormatError(f"key {key[:80]!r}: found {len(key)} bytes, expected at most 65535")
        if isinstance(value, ValueRef):
            files.add(value.file)
            _check_place(value, "out-of-line value")
        elif len(value) > _MAX_INLINE_BYTES:
            found = f"a value of {len(value)} bytes"
            raise FormatError(f"key {key[:80]!r}: found {found}, expected at most 1048576")
    for path in files:
        wire.check_path(path, "B+tree")


def _check_place(ref: ValueRef | NodeRef, what: str) -> None:
    if not ref.file or not 0 <= ref.offset <= ref.offset + ref.length <= wire.MAX_OFFSET:
        raise FormatError(f"{what}: found {ref!r}, expected a file and an end below 2**63")


def _leaf(entries: Sequence[Entry]) -> tuple[bytes, int]:
    """A leaf, and the size of all its out-of-line values."""
    refs = [v for _, v in entries if isinstance(v, ValueRef)]
    ids = {file: i for i, file in enumerate(sorted({ref.file for ref in refs}))}
    blob = wire.encode_frame(
        NODE_MAGIC,
        b"\0",
        wire.encode_files(ids),
        wire.encode_strings([key for key, _ in entries]),
        wire.encode_varints([v.length if isinstance(v, ValueRef) else len(v) for _, v in entries]),
        bytes(isinstance(v, ValueRef) for _, v in entries),
        wire.encode_varints([ids[ref.file] for ref in refs]),
        wire.encode_varints([ref.offset for ref in refs]),
        *(v for _, v in entries if isinstance(v, bytes)),
    )
    return blob, sum(ref.length for ref in refs)


def encode_manifest(root: NodeRef, *, uuid: bytes, commit_time_ns: int) -> bytes:
    """The manifest of a new database with one version.

    Args:
        root: from `encode_nodes`.
        uuid: 16 random bytes.
        commit_time_ns: now, in nanoseconds since 1970.
    """
    # How many versions there are, the generation of this one, and its root: height, file, place.
    version = (1, 1, root.height, 0, root.offset, root.length)
    return wire.encode_frame(
        MANIFEST_MAGIC,
        uuid,
        wire.encode_varints(_CONFIG),
        wire.encode_files([root.file]),
        wire.encode_varints((*version, *root.counts)),
        commit_time_ns.to_bytes(8, "little"),
        b"\0",  # no nodes of older versions
    )


def decode_manifest(data: bytes, *, what: str = "manifest.ocdbt", is_last: bool = False) -> NodeRef:
    """The root of the newest version that a manifest records; `EMPTY_ROOT` if it has no keys.

    Args:
        data: the whole file.
        what: names it in errors.
        is_last: whether it is the last of several `manifest.<16 hex digits>`, which counts.

    Raises:
        DamagedCheckpointError: not the bytes that were written.
        NumberedManifestError: the versions are in numbered ones.
        FormatError: a valid checksum over contents that break the format.
    """
    reader = wire.open_frame(data, MANIFEST_MAGIC, what)
    reader.take(16, "uuid")
    if reader.varint("manifest kind", 1) and not is_last:
        found = "found 1 (numbered), expected 0 (single): the versions are in other files"
        raise NumberedManifestError(f"{what}: manifest kind: {found}")
    reader.varints(3, "configuration")
    if reader.varint("compression method", 1):
        reader.take(4, "zstd level")
    files = reader.files("")
    if not (count := reader.varint("version count", wire.MAX_OFFSET)):
        raise reader.error("version count", 0, "at least 1")
    reader.varints(count, "generation")  # increasing: the last version is the newest
    height = reader.take(count, "root height")[-1]
    file, base = reader.pick(files, count)[-1]
    columns = [reader.varints(count, "root place", wire.MAX_UINT64) for _ in range(5)]
    offset, length, keys, nodes, outside = (int(column[-1]) for column in columns)
    # Commit times and references to older versions follow.
    return NodeRef(height, file, offset, length, base=base, counts=(keys, nodes, outside))


def read_tree(root: NodeRef, fetch: Callable[[str, int, int], wire.Buffer]) -> dict[bytes, Value]:
    """All keys of a database, in order, with their values or where those are.

    Args:
        root: from `decode_manifest`.
        fetch: `fetch(file, offset, length)` returns these bytes; `file` is relative to the
            database directory and checked to stay inside it. What it raises passes through.

    Raises:
        DamagedCheckpointError: not the bytes that were written.
        FormatError: a valid checksum over contents that break the format, or a tree that would
            take more than about 2 GB of memory.
    """
    found: dict[bytes, Value] = {}
    last: list[bytes] = []
    todo = [root] if root.file else []
    spent = read = 0
    seen: set[tuple[str, int]] = set()
    while todo:
        ref = todo.pop()
        _check_place(ref, "B+tree node")
        spent += _NODE_COST + ref.length
        read += _NODE_COST + ref.length
        most = wire.grown(read, _MAX_TREE_BYTES)
        if ref.length > wire.MAX_NODE or spent > most:
            size = f"{ref}: found a node of {ref.length} bytes in a tree of {spent}"
            raise FormatError(f"{size}, expected at most {wire.MAX_NODE} in {most}")
        if (ref.file, ref.offset) in seen:
            raise FormatError(f"{ref}: found twice in the tree, expected once")
        seen.add((ref.file, ref.offset))
        reader, files, keys, marks = _open_node(fetch(ref.file, ref.offset, ref.length), ref)
        spent += reader.size + _ROW_COST * len(keys) + sum(map(len, keys))
        if ref.height:
            todo += reversed(_children(reader, files, keys, marks, ref.height - 1))
            continue
        if any(map(operator.ge, last + keys, keys if last else keys[1:])):
            raise FormatError(f"{ref}: found keys out of order, expected strictly increasing keys")
        last = keys[-1:] or last
        found.update(zip(keys, _values(reader, files, len(keys)), strict=True))
    _check_apart([value for value in found.values() if isinstance(value, ValueRef)])
    if len(found) != root.counts[0]:
        raise FormatError(f"{root}: found {len(found)} keys, expected {root.counts[0]}")
    return found


def _check_apart(refs: list[ValueRef]) -> None:
    """Checks that no bytes are in two values: a small file could describe any amount of data."""
    ids = {file: i for i, file in enumerate({ref.file for ref in refs})}
    columns = ([ids[r.file] for r in refs], [r.offset for r in refs], [r.length for r in refs])
    file, start, length = np.array(columns, np.int64)
    order = np.lexsort((start, file))
    order = order[length[order] > 0]
    file, start, end = file[order], start[order], (start + length)[order]
    if np.any((file[1:] == file[:-1]) & (start[1:] < end[:-1])):
        raise FormatError("B+tree: found values that overlap, expected each in bytes of its own")


def _open_node(
    data: wire.Buffer, ref: NodeRef
) -> tuple[wire.Reader, _Files, list[bytes], wire.Column]:
    """A node's file table, its keys, and what marks are in them; the reader goes on from there."""
    reader = wire.open_frame(data, NODE_MAGIC, str(ref))
    if (height := reader.take(1, "height")[0]) != ref.height:
        raise reader.error("height", height, ref.height)
    return reader, reader.files(ref.base), *reader.strings("key", ref.prefix, marked=height > 0)


def _children(
    reader: wire.Reader, files: _Files, keys: list[bytes], marks: wire.Column, height: int
) -> list[NodeRef]:
    """What an interior node refers to."""
    places = reader.pick(files, len(keys))
    offsets = reader.varints(len(keys), "node offset").tolist()
    lengths = reader.varints(len(keys), "node length").tolist()
    reader.varints(3 * len(keys), "node counts")
    reader.finish()
    columns = (keys, marks.tolist(), places, offsets, lengths)
    return [
        NodeRef(height, file, offset, length, key[:mark], base)
        for key, mark, (file, base), offset, length in zip(*columns, strict=True)
    ]


def _values(reader: wire.Reader, files: _Files, count: int) -> list[Value]:
    """The value of each key of a leaf."""
    lengths = reader.varints(count, "value length")
    kinds = reader.take(count, "value kind")
    if (kind := max(kinds, default=0)) > 1:
        raise reader.error("value kind", kind, "0 or 1")
    outside = np.frombuffer(kinds, bool)
    places = [file for file, _ in reader.pick(files, int(outside.sum()))]
    offsets = reader.varints(len(places), "value offset")
    refs = list(map(ValueRef, places, offsets.tolist(), lengths[outside].tolist()))
    if "" in places or np.any(offsets + lengths[outside] > wire.MAX_OFFSET):
        for ref in refs:
            _check_place(ref, reader.what)
    sizes: list[int] = lengths[~outside].tolist()
    blob = reader.take(sum(sizes), "inline value")
    reader.finish()
    ends = itertools.accumulate(sizes)
    columns = iter([blob[end - n : end] for n, end in zip(sizes, ends, strict=True)]), iter(refs)
    return [next(columns[kind]) for kind in kinds]


def _table_head(keys: Sequence[bytes]) -> bytes:
    lengths = np.fromiter(map(len, keys), "<u4", len(keys))
    crc = crc32c.crc32c(b"".join(keys), crc32c.crc32c(lengths.tobytes()))
    return struct.pack("<8sIQI", b"fckptcrc", 1, len(keys), crc)


def encode_table(keys: Sequence[bytes], crcs: Sequence[int]) -> bytes:
    """The table as a file, from all keys of the database, increasing, and their values' CRCs."""
    return wire.with_crc(_table_head(keys) + np.array(crcs, "<u4").tobytes())


def decode_table(data: bytes, keys: Sequence[bytes], *, what: str = "table") -> NDArray[np.uint32]:
    """The CRC-32C of each key's value.

    Args:
        data: the whole file.
        keys: all keys that the database has now, increasing.
        what: names the file in errors.

    Raises:
        DamagedCheckpointError: not the bytes that were written, or a table of other keys.
        FormatError: no table, or one of another version.
    """
    wire.check_crc(data, what)
    head = _table_head(keys)
    size = len(head) + 4 * len(keys) + 4
    if data[:12] != head[:12]:
        raise FormatError(f"{what}: found {data[:12]!r} at its start, expected {head[:12]!r}")
    if data[:24] != head or len(data) != size:
        found = f"{data[12:24].hex()} and {len(data)} bytes"
        expected = f"{head[12:].hex()} and {size} bytes for the {len(keys)} keys in the database"
        raise DamagedCheckpointError(f"{what}: found {found}, expected {expected}")
    return np.frombuffer(data, "<u4", len(keys), len(head))
