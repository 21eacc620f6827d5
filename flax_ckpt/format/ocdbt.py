"""OCDBT databases: the manifest, and everything else that callers need to read or write one.

A database is a directory with `manifest.ocdbt` and data files. Written from TensorStore's public
description of the format (`kvstore/ocdbt/index.rst`); no I/O here, callers pass bytes in and out.

    blobs, root = encode_nodes(entries, file=file, offset=size)      # append blobs to `file`
    manifest = encode_manifest(root, uuid=uuid, commit_time_ns=now)  # write as manifest.ocdbt
    read_tree(decode_manifest(manifest), fetch) == entries
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from flax_ckpt.errors import FormatError
from flax_ckpt.format import wire
from flax_ckpt.format.btree import (
    DEFAULT_DECODED_BYTES,
    DEFAULT_NODE_BYTES,
    EMPTY_ROOT,
    MAX_INLINE_BYTES,
    MAX_KEY_BYTES,
    Entry,
    Node,
    NodeRef,
    Value,
    ValueRef,
    decode_node,
    encode_nodes,
)

__all__ = [
    "DEFAULT_NODE_BYTES",
    "EMPTY_ROOT",
    "MAX_INLINE_BYTES",
    "MAX_KEY_BYTES",
    "Entry",
    "Manifest",
    "Node",
    "NodeRef",
    "NumberedManifestError",
    "Value",
    "ValueRef",
    "decode_manifest",
    "decode_node",
    "encode_manifest",
    "encode_nodes",
    "read_tree",
]

MANIFEST_MAGIC: Final = 0x0CDB3A2A
# What Orbax configures. Readers ignore them; a later writer of the database follows them.
_MAX_INLINE_VALUE_BYTES: Final = 1024
_ARITY_LOG2: Final = 4
_MAX_ARITY_LOG2: Final = 16
_MAX_MANIFEST_BYTES: Final = 64 << 20
_MAX_U32: Final = 2**32 - 1
_MAX_U64: Final = 2**64 - 1
# A node may exceed the configured size by one entry; a damaged configuration must not reach far.
_LEAST_NODE_LIMIT: Final = 16 << 20
_MOST_NODE_LIMIT: Final = 1 << 30
# What an entry, and a node with the time to read it, count for in `max_bytes` of `read_tree`.
_ENTRY_COST: Final = 128
_NODE_COST: Final = 4096


class NumberedManifestError(FormatError):
    """The database keeps its versions in numbered manifests, which only TensorStore reads."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says about the newest version of a database.

    Attributes:
        uuid: 16 bytes.
        max_inline_value_bytes: larger values are written out of line.
        max_decoded_node_bytes: about the largest node, before compression.
        generation: number of the newest version, counted from 1.
        root: root node of the newest version; `root.is_empty` if it has no keys.
        commit_time_ns: when that was written, in nanoseconds since 1970.
    """

    uuid: bytes
    max_inline_value_bytes: int
    max_decoded_node_bytes: int
    generation: int
    root: NodeRef
    commit_time_ns: int

    @property
    def node_limit(self) -> int:
        """Most bytes that we let a node decode to."""
        wanted = self.max_decoded_node_bytes + MAX_INLINE_BYTES + MAX_KEY_BYTES
        return min(max(wanted, _LEAST_NODE_LIMIT), _MOST_NODE_LIMIT)


def encode_manifest(root: NodeRef, *, uuid: bytes, commit_time_ns: int) -> bytes:
    """The manifest of a new database with one version.

    Args:
        root: from `encode_nodes`.
        uuid: 16 random bytes.
        commit_time_ns: now, in nanoseconds since 1970.

    Raises:
        FormatError: an argument that the format cannot hold.
    """
    if root.base or root.prefix:
        raise FormatError(f"{root}: found a node of another database, expected one of this")
    if len(uuid) != 16:
        raise FormatError(f"uuid: found {len(uuid)} bytes, expected 16")
    if not 0 <= commit_time_ns <= wire.MAX_OFFSET:
        raise FormatError(f"commit_time_ns: found {commit_time_ns}, expected 0 to 2**63 - 1")
    config = (0, _MAX_INLINE_VALUE_BYTES, DEFAULT_DECODED_BYTES, _ARITY_LOG2, 0)
    place = (0, root.offset, root.length)
    counts = (root.num_keys, root.num_tree_bytes, root.num_indirect_value_bytes)
    one_version, generation, no_version_nodes = 1, 1, 0
    parts = [
        uuid,
        *map(wire.encode_varint, config),
        wire.encode_files([root.file]),
        *map(wire.encode_varint, (one_version, generation)),
        bytes([root.height]),
        *map(wire.encode_varint, place + counts),
        commit_time_ns.to_bytes(8, "little"),
        wire.encode_varint(no_version_nodes),
    ]
    return wire.encode_frame(MANIFEST_MAGIC, parts)


def decode_manifest(data: bytes, *, what: str = "manifest.ocdbt") -> Manifest:
    """The newest version that a manifest records.

    Args:
        data: the whole file.
        what: names it in errors.

    Raises:
        DamagedCheckpointError: not the bytes that were written.
        NumberedManifestError: the versions are in other files; read them through TensorStore.
        FormatError: a valid checksum over contents that break the format.
    """
    reader = wire.open_frame(data, MANIFEST_MAGIC, what, _MAX_MANIFEST_BYTES)
    uuid = reader.take(16, "uuid")
    if (kind := reader.byte("manifest kind")) > 1:
        raise reader.error("manifest kind", kind, "0 (single) or 1 (numbered)")
    max_inline = reader.varint("max_inline_value_bytes", _MAX_U32)
    max_decoded = reader.varint("max_decoded_node_bytes", _MAX_U32)
    arity_log2 = reader.byte("version_tree_arity_log2")
    if not 1 <= arity_log2 <= _MAX_ARITY_LOG2:
        raise reader.error("version_tree_arity_log2", arity_log2, f"1 to {_MAX_ARITY_LOG2}")
    if reader.varint("compression method", 1):
        reader.take(4, "zstd level")
    if kind:
        reader.finish()
        raise NumberedManifestError(
            f"{what}: manifest kind: found 1 (numbered), expected 0 (single): "
            "numbered manifests are read through TensorStore"
        )
    files = reader.files("")
    generation, root, time = _read_versions(reader, files, 1 << arity_log2)
    _read_version_nodes(reader, files, 63 // arity_log2)
    reader.finish()
    return Manifest(uuid, max_inline, max_decoded, generation, root, time)


def _read_versions(
    reader: wire.Reader, files: list[wire.DataFile], most: int
) -> tuple[int, NodeRef, int]:
    """Generation, root and commit time of the last of the inline versions."""
    count = reader.varint("version count", most)
    if not count:
        raise reader.error("version count", 0, "at least 1")
    generations = reader.varints(count, "generation")
    if int(generations[0]) < 1 or np.any(generations[1:] <= generations[:-1]):
        raise reader.error("generations", generations.tolist()[:20], "increasing numbers from 1")
    height = reader.take(count, "root heights")[-1]
    file = reader.pick(files, count)[-1]
    offset, length = (
        int(reader.varints(count, name, _MAX_U64)[-1]) for name in ("root offset", "root length")
    )
    keys, tree, indirect = (
        int(reader.varints(count, name, _MAX_U64)[-1])
        for name in ("number of keys", "number of tree bytes", "number of indirect value bytes")
    )
    time = int(reader.uint64s(count, "commit time")[-1])
    if offset == length == _MAX_U64:
        if height or keys or file.path:
            raise reader.error(
                "root", f"{keys} keys at height {height} without a node", "0 keys at height 0"
            )
        return int(generations[-1]), EMPTY_ROOT, time
    if offset + length > wire.MAX_OFFSET:
        raise reader.error("end of the root", offset + length, f"at most {wire.MAX_OFFSET}")
    if not file.path:
        raise reader.error("data file path", "''", "a relative path inside the database")
    root = NodeRef(height, file.path, offset, length, keys, tree, indirect, base=file.base)
    return int(generations[-1]), root, time


def _read_version_nodes(reader: wire.Reader, files: list[wire.DataFile], most: int) -> None:
    """Checks the references to older versions; we never follow them."""
    count = reader.varint("version node count", most)
    reader.varints(count, "version node generation")
    reader.pick(files, count)
    for name in ("offset", "length", "generation count"):
        reader.varints(count, f"version node {name}")
    reader.uint64s(count, "version node commit time")
    reader.take(count, "version node height")


def read_tree(
    manifest: Manifest,
    fetch: Callable[[str, int, int], bytes],
    *,
    max_bytes: int = 2 << 30,
) -> list[Entry]:
    """All keys of the newest version, in order, with their values or where those are.

    Args:
        manifest: from `decode_manifest`.
        fetch: `fetch(file, offset, length)` returns these bytes; `file` is relative to the
            database directory and checked to stay inside it. What it raises passes through.
        max_bytes: most memory that the nodes and the result may take, roughly. A tree may name
            one node many times, so that a small file could describe a result without end.

    Raises:
        DamagedCheckpointError, FormatError: as `decode_node`; keys of different nodes out of
            order; more than `max_bytes`.
    """
    entries: list[Entry] = []
    todo = [] if manifest.root.is_empty else [manifest.root]
    longest = 2 * manifest.node_limit
    spent = 0
    while todo:
        ref = todo.pop()
        if ref.length > longest:
            raise FormatError(f"{ref}: found {ref.length} bytes, expected at most {longest}")
        spent = _spend(ref, spent, _NODE_COST + ref.length, max_bytes)
        data = fetch(ref.file, ref.offset, ref.length)
        node = decode_node(data, ref, max_decoded_bytes=manifest.node_limit)
        size = sum(_ENTRY_COST + len(key) for key, _ in node.entries)
        size += sum(_ENTRY_COST + 2 * len(child.min_key) for child in node.children)
        spent = _spend(ref, spent, size, max_bytes)
        if entries and node.entries and node.entries[0][0] <= entries[-1][0]:
            first, last = wire.shorten(node.entries[0][0]), wire.shorten(entries[-1][0])
            raise FormatError(f"{ref}: first key: found {first}, expected one after {last}")
        todo.extend(reversed(node.children))
        entries += node.entries
    return entries


def _spend(ref: NodeRef, spent: int, size: int, most: int) -> int:
    if spent + size > most:
        raise FormatError(
            f"{ref}: found a tree above {spent + size} bytes, expected at most {most}"
        )
    return spent + size
