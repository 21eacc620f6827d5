"""B+tree nodes of an OCDBT database: sorted keys with inline values or references to files.

Written from TensorStore's public description of the format (`kvstore/ocdbt/index.rst`). We write
uncompressed nodes and read any.

    blobs, root = encode_nodes([(b"a", b"inline"), (b"b", ValueRef("d/00", 0, 64))],
                               file="d/00", offset=64)
    decode_node(blobs[-1], root).entries == [(b"a", b"inline"), (b"b", ValueRef("d/00", 0, 64))]
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, DuplicateNameError, FormatError
from flax_ckpt.format import wire

NODE_MAGIC: Final = 0x0CDB20DE
MAX_KEY_BYTES: Final = wire.MAX_KEY
MAX_INLINE_BYTES: Final = 1 << 20
MAX_NODE_ENTRIES: Final = 1 << 20
# Nodes are read whole, so smaller ones cost less to change and larger ones less to list.
DEFAULT_NODE_BYTES: Final = 8 << 20
DEFAULT_DECODED_BYTES: Final = 100_000_000
_ENTRY_BYTES: Final = 16  # what a node entry costs beside its key and its value


@dataclass(frozen=True, slots=True)
class ValueRef:
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


@dataclass(frozen=True, slots=True)
class NodeRef:
    """Where a node is, and what its parent (for a root: the manifest) says about it.

    Attributes:
        height: 0 for a leaf.
        file: data file, relative to the database directory; "" if the database is empty.
        offset: its first byte in that file.
        length: its size in bytes.
        num_keys: keys of all leaves below it.
        num_tree_bytes: size of it and of all nodes below it.
        num_indirect_value_bytes: size of all out-of-line values below it.
        min_key: no key below it is less; empty for a root.
        prefix: start of all keys below it, which the nodes leave out; empty for a root.
        base: what the paths in it are relative to; "" or a path that ends in "/".
    """

    height: int
    file: str
    offset: int
    length: int
    num_keys: int
    num_tree_bytes: int
    num_indirect_value_bytes: int
    min_key: bytes = b""
    prefix: bytes = b""
    base: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether this is the root of a database without keys: there is no node to read."""
        return not self.file

    def __str__(self) -> str:
        return f"B+tree node {self.file}[{self.offset}:{self.offset + self.length}]"


_NOWHERE: Final = 2**64 - 1
EMPTY_ROOT: Final = NodeRef(0, "", _NOWHERE, _NOWHERE, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Node:
    """A decoded node: `entries` of a leaf or `children` of an interior node, by full key."""

    height: int
    entries: list[Entry]
    children: list[NodeRef]


def encode_nodes(
    entries: Sequence[Entry], *, file: str, offset: int, max_node_bytes: int = DEFAULT_NODE_BYTES
) -> tuple[list[bytes], NodeRef]:
    """The B+tree of a database, as node blobs and the reference to its root.

    Args:
        entries: (key, value), keys strictly increasing.
        file: data file that the blobs will be appended to, relative to the database directory.
        offset: size of that file before the first blob; the blobs follow without a gap.
        max_node_bytes: a node is split where its decoded keys and values exceed this, or 100 MB.

    Returns:
        The blobs in file order, leaves first and the root last, and the root for
        `encode_manifest`. Without entries: no blob and `EMPTY_ROOT`.

    Raises:
        DuplicateNameError: a key occurs twice.
        FormatError: keys out of order; a key above 65,535 bytes; an inline value above 1 MiB;
            a path or a range that the format cannot hold.
    """
    keys = [key for key, _ in entries]
    values = [value for _, value in entries]
    weights = _check(keys, values)
    wire.check_path(file, "data file of the B+tree")
    limit = min(max(max_node_bytes, 1), DEFAULT_DECODED_BYTES)
    if not keys:
        return [], EMPTY_ROOT
    out = _Blobs(file, offset)
    shared = wire.common_prefixes(keys)
    spans = list(_split(weights, limit, 1))
    level = [out.leaf(keys[a:b], values[a:b], shared[a:b], len(spans) == 1) for a, b in spans]
    height = 0
    while len(level) > 1:
        height += 1
        weights = np.array([4 * _ENTRY_BYTES + len(file) + len(ref.min_key) for ref in level])
        spans = list(_split(weights, limit, 2))
        level = [out.interior(level[a:b], height, len(spans) == 1) for a, b in spans]
    return out.blobs, level[0]


def _check(keys: list[bytes], values: list[Value]) -> NDArray[np.int64]:
    """Checks what `encode_nodes` promises; returns the size of each entry."""
    sizes = np.fromiter(map(len, keys), np.int64, len(keys))
    if len(keys) and (top := int(sizes.max())) > MAX_KEY_BYTES:
        key = wire.shorten(keys[int(sizes.argmax())])
        raise FormatError(f"key {key}: found {top} bytes, expected at most {MAX_KEY_BYTES}")
    if not all(map(operator.lt, keys, islice(keys, 1, None))):
        at = next(i for i in range(1, len(keys)) if keys[i - 1] >= keys[i])
        last, key = wire.shorten(keys[at - 1]), wire.shorten(keys[at])
        if keys[at - 1] == keys[at]:
            raise DuplicateNameError(f"key {key} occurs twice in one database")
        raise FormatError(f"key {key}: found after {last}, expected keys in increasing order")
    inline = [0 if isinstance(v, ValueRef) else len(v) for v in values]
    if inline and (top := max(inline)) > MAX_INLINE_BYTES:
        key = wire.shorten(keys[inline.index(top)])
        raise FormatError(
            f"key {key}: found an inline value of {top} bytes, expected at most {MAX_INLINE_BYTES}"
        )
    refs = [v for v in values if isinstance(v, ValueRef)]
    for path in {ref.file for ref in refs}:
        wire.check_path(path, "out-of-line value")
    wire.uint64s([ref.offset + ref.length for ref in refs], "end of an out-of-line value")
    return sizes + inline + _ENTRY_BYTES


def _split(weights: NDArray[np.int64], limit: int, least: int) -> Iterator[tuple[int, int]]:
    """Ranges of entries that fit a node, of similar weight and at least `least` entries."""
    ends = np.cumsum(weights)
    count = len(weights)
    start = done = 0
    while start < count:
        left = int(ends[-1]) - done
        nodes = max(-(-left // limit), -(-(count - start) // MAX_NODE_ENTRIES))
        end = int(np.searchsorted(ends, done + -(-left // nodes))) + 1
        if int(ends[end - 1]) - done > limit:
            end -= 1
        end = min(max(end, start + least), start + MAX_NODE_ENTRIES, count)
        if count - end < least:
            end = count
        yield start, end
        start, done = end, int(ends[end - 1])


class _Blobs:
    """The blobs so far, and where the next one goes."""

    def __init__(self, file: str, offset: int) -> None:
        self.blobs: list[bytes] = []
        self._file = file
        self._offset = offset

    def leaf(
        self, keys: list[bytes], values: list[Value], shared: NDArray[np.int64], is_root: bool
    ) -> NodeRef:
        skip = 0 if is_root else _common_prefix(keys[0], keys[-1])
        refs = [v for v in values if isinstance(v, ValueRef)]
        files = sorted({ref.file for ref in refs})
        ids = {file: i for i, file in enumerate(files)}
        columns = _key_columns(keys, shared, skip)
        lengths = [v.length if isinstance(v, ValueRef) else len(v) for v in values]
        parts = [
            b"\0",
            wire.encode_files(files),
            wire.encode_varint(len(keys)),
            *columns,
            wire.encode_varints(wire.uint64s(lengths, "value length")),
            bytes([isinstance(v, ValueRef) for v in values]),
            wire.encode_varints(wire.uint64s([ids[ref.file] for ref in refs], "file id")),
            wire.encode_varints(wire.uint64s([ref.offset for ref in refs], "value offset")),
            *[v for v in values if not isinstance(v, ValueRef)],
        ]
        counts = (len(keys), 0, sum(ref.length for ref in refs))
        return self._add(parts, 0, counts, keys[0], keys[0][:skip])

    def interior(self, children: list[NodeRef], height: int, is_root: bool) -> NodeRef:
        keys = [ref.min_key for ref in children]
        prefixes = [len(ref.prefix) for ref in children]
        skip = 0 if is_root else min(_common_prefix(keys[0], keys[-1]), *prefixes)
        shared = wire.common_prefixes(keys)
        lead, suffixes = _key_columns(keys, shared, skip)
        fields = ("offset", "length", "num_keys", "num_tree_bytes", "num_indirect_value_bytes")
        columns = [[getattr(ref, name) for ref in children] for name in fields]
        parts = [
            bytes([height]),
            wire.encode_files([self._file]),
            wire.encode_varint(len(keys)),
            lead,
            wire.encode_varints(wire.uint64s([n - skip for n in prefixes], "prefix length")),
            suffixes,
            bytes(len(keys)),
            *[wire.encode_varints(wire.uint64s(c, "node")) for c in columns],
        ]
        counts = (sum(columns[2]), sum(columns[3]), sum(columns[4]))
        return self._add(parts, height, counts, keys[0], keys[0][:skip])

    def _add(
        self,
        parts: list[bytes],
        height: int,
        counts: tuple[int, int, int],
        min_key: bytes,
        prefix: bytes,
    ) -> NodeRef:
        blob = wire.encode_frame(NODE_MAGIC, parts)
        offset = self._offset
        self.blobs.append(blob)
        self._offset += len(blob)
        keys, tree, indirect = counts
        tree += len(blob)
        return NodeRef(height, self._file, offset, len(blob), keys, tree, indirect, min_key, prefix)


def _common_prefix(a: bytes, b: bytes) -> int:
    return int(wire.common_prefixes([a, b])[1])


def _key_columns(keys: list[bytes], shared: NDArray[np.int64], skip: int) -> tuple[bytes, bytes]:
    """The columns of key lengths, and the key bytes, all without the first `skip` bytes."""
    starts = shared.copy()
    starts[0] = skip
    suffixes = [key[at:] for key, at in zip(keys, starts.tolist(), strict=True)]
    lengths = np.fromiter(map(len, suffixes), np.uint64, len(suffixes))
    lead = wire.encode_varints((starts[1:] - skip).astype(np.uint64)) + wire.encode_varints(lengths)
    return lead, b"".join(suffixes)


def decode_node(
    data: bytes, ref: NodeRef, *, max_decoded_bytes: int = DEFAULT_DECODED_BYTES
) -> Node:
    """The node that `ref` refers to.

    Args:
        data: `ref.length` bytes of `ref.file` from `ref.offset`.
        ref: from the manifest or from the parent; says height, key prefix and base path.
        max_decoded_bytes: most bytes that a compressed node may decode to.

    Raises:
        DamagedCheckpointError: not the bytes that were written.
        FormatError: a valid checksum over contents that break the format or these limits.
    """
    if len(data) != ref.length:
        raise DamagedCheckpointError(f"{ref}: found {len(data)} bytes, expected {ref.length}")
    reader = wire.open_frame(data, NODE_MAGIC, str(ref), max_decoded_bytes)
    if (height := reader.byte("height")) != ref.height:
        raise reader.error("height", height, ref.height)
    files = reader.files(ref.base)
    count = reader.varint("entry count", MAX_NODE_ENTRIES)
    if not count:
        raise reader.error("entry count", 0, "at least 1")
    if height:
        node = Node(height, [], _read_children(reader, files, count, ref))
        num_keys = sum(child.num_keys for child in node.children)
    else:
        node = Node(height, _read_entries(reader, files, count, ref), [])
        num_keys = count
    reader.finish()
    if num_keys != ref.num_keys:
        raise reader.error("number of keys", num_keys, ref.num_keys)
    return node


def _read_entries(
    reader: wire.Reader, files: list[wire.DataFile], count: int, ref: NodeRef
) -> list[Entry]:
    shared = reader.varints(count - 1, "key prefix length", MAX_KEY_BYTES)
    suffix = reader.varints(count, "key suffix length", MAX_KEY_BYTES)
    keys = _read_keys(reader, shared, suffix, ref)
    lengths = reader.varints(count, "value length")
    kinds = np.frombuffer(reader.take(count, "value kind"), np.uint8)
    if (top := int(kinds.max())) > 1:
        raise reader.error("value kind", top, "0 or 1")
    outside = np.flatnonzero(kinds)
    inside = np.flatnonzero(kinds == 0)
    rows = reader.pick(files, len(outside))
    offsets = reader.varints(len(outside), "value offset")
    _check_ranges(reader, rows, offsets, lengths[outside])
    sizes = lengths[inside]
    if len(sizes) and (top := int(sizes.max())) > MAX_INLINE_BYTES:
        raise reader.error("inline value length", top, f"at most {MAX_INLINE_BYTES}")
    blob = reader.take(int(sizes.sum()), "inline values")
    paths = [row.path for row in rows]
    refs = map(ValueRef, paths, offsets.tolist(), lengths[outside].tolist())
    ends = np.cumsum(sizes)
    inline = map(blob.__getitem__, map(slice, (ends - sizes).tolist(), ends.tolist()))
    sources = (inline, refs)
    values = map(next, map(sources.__getitem__, kinds.tolist()))
    return list(zip(keys, values, strict=True))


def _read_children(
    reader: wire.Reader, files: list[wire.DataFile], count: int, ref: NodeRef
) -> list[NodeRef]:
    shared = reader.varints(count - 1, "key prefix length", MAX_KEY_BYTES)
    suffix = reader.varints(count, "key suffix length", MAX_KEY_BYTES)
    common = reader.varints(count, "subtree prefix length", MAX_KEY_BYTES)
    keys = _read_keys(reader, shared, suffix, ref)
    rows = reader.pick(files, count)
    offsets = reader.varints(count, "node offset")
    lengths = reader.varints(count, "node length")
    _check_ranges(reader, rows, offsets, lengths)
    num_keys, tree, indirect = (
        reader.varints(count, name).tolist()
        for name in ("number of keys", "number of tree bytes", "number of indirect value bytes")
    )
    skips: list[int] = (common + np.uint64(len(ref.prefix))).tolist()
    for key, skip in zip(keys, skips, strict=True):
        if skip > len(key):
            raise reader.error("subtree prefix length", skip, f"at most {len(key)}")
    return list(
        map(
            NodeRef,
            [ref.height - 1] * count,
            [row.path for row in rows],
            offsets.tolist(),
            lengths.tolist(),
            num_keys,
            tree,
            indirect,
            keys,
            [key[:skip] for key, skip in zip(keys, skips, strict=True)],
            [row.base for row in rows],
        )
    )


def _read_keys(
    reader: wire.Reader, shared: NDArray[np.uint64], suffix: NDArray[np.uint64], ref: NodeRef
) -> list[bytes]:
    """Full keys: strictly increasing, none below what the parent says."""
    keys = reader.prefixed(shared, suffix, "key", len(ref.prefix))
    if ref.prefix:
        keys = [ref.prefix + key for key in keys]
    if not all(map(operator.lt, keys, islice(keys, 1, None))):
        raise reader.error("keys", "keys out of order", "strictly increasing keys")
    if keys[0] < ref.min_key:
        low = wire.shorten(ref.min_key)
        raise reader.error("first key", wire.shorten(keys[0]), f"at least {low}")
    return keys


def _check_ranges(
    reader: wire.Reader,
    rows: list[wire.DataFile],
    offsets: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
) -> None:
    """Checks that each reference names a file and ends below 2**63."""
    if not all(row.path for row in rows):
        raise reader.error("data file path", "''", "a relative path inside the database")
    # Both are below 2**63, so that the sum cannot wrap.
    if len(rows) and (top := int((offsets + lengths).max())) > wire.MAX_OFFSET:
        raise reader.error("end of a reference", top, f"at most {wire.MAX_OFFSET}")
