"""OCDBT: what we write TensorStore reads, what TensorStore writes we read, damage is an error."""

from __future__ import annotations

import os
import random
import tempfile
import tracemalloc
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import crc32c
import pytest
import tensorstore as ts
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flax_ckpt.errors import DamagedCheckpointError, DuplicateNameError, FormatError
from flax_ckpt.format import ocdbt, wire
from flax_ckpt.format.ocdbt import EMPTY_ROOT, NodeRef, ValueRef

FILE = "d/" + "0123456789abcdef" * 2
UUID = bytes(range(16))
LONGEST = b"k" * 65_535


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


keys = st.one_of(
    st.text(alphabet=st.sampled_from("ab/.é漢😀 \0"), max_size=12).map(str.encode),
    st.binary(max_size=30),
    st.integers(0, 255).map(lambda i: b"params.layers_%d.kernel/c/0" % i),
    st.sampled_from([b"", b"/", LONGEST, LONGEST[:-1], LONGEST[:-1] + b"z", b"k" * 300]),
)
values = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\0" * 1023, b"\1" * 1024, b"\2" * 1025, b"\3" * 5000]),
)
databases = st.dictionaries(keys, values, max_size=25)


# Reading and writing whole databases.


def encode_nodes(
    entries: list[ocdbt.Entry], offset: int, leaf_bytes: int
) -> tuple[list[bytes], NodeRef]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt, "_LEAF_BYTES", leaf_bytes)
        return ocdbt.encode_nodes(entries, file=FILE, offset=offset)


def write(
    directory: Path | str,
    database: Mapping[bytes, bytes],
    *,
    leaf_bytes: int = 8 << 20,
    inline: int = 1024,
) -> NodeRef:
    """Writes `database` with our encoder: values above `inline` bytes out of line."""
    path = Path(directory, FILE)
    path.parent.mkdir()
    data = bytearray()
    entries: list[ocdbt.Entry] = []
    for key in sorted(database):
        value = database[key]
        if len(value) <= inline:
            entries.append((key, value))
            continue
        data += bytes(-len(data) % 64)
        entries.append((key, ValueRef(FILE, len(data), len(value))))
        data += value
    blobs, root = encode_nodes(entries, len(data), leaf_bytes)
    path.write_bytes(data + b"".join(blobs))
    manifest = ocdbt.encode_manifest(root, uuid=UUID, commit_time_ns=1)
    Path(directory, "manifest.ocdbt").write_bytes(manifest)
    return root


def fetcher(directory: Path | str) -> Any:
    def fetch(file: str, offset: int, length: int) -> bytes:
        with open(os.path.join(directory, file), "rb") as f:
            f.seek(offset)
            return f.read(length)

    return fetch


def entries_of(directory: Path | str) -> list[ocdbt.Entry]:
    manifest = ocdbt.decode_manifest(Path(directory, "manifest.ocdbt").read_bytes())
    return list(ocdbt.read_tree(manifest, fetcher(directory)).items())


def read(directory: Path | str) -> dict[bytes, bytes]:
    """All of a database with our decoder."""
    fetch = fetcher(directory)
    return {
        key: fetch(value.file, value.offset, value.length) if isinstance(value, ValueRef) else value
        for key, value in entries_of(directory)
    }


def open_ts(directory: Path | str, **spec: Any) -> ts.KvStore:
    base = {"driver": "file", "path": f"{directory}/"}
    context = spec.pop("context", None)
    return ts.KvStore.open({"driver": "ocdbt", "base": base, **spec}, context=context).result()


def read_ts(directory: Path | str) -> dict[bytes, bytes]:
    """All of a database with TensorStore: found by listing, each value by looking its key up."""
    store = open_ts(directory)
    found = {key: store.read(key) for key in store.list().result()}
    return {key: future.result().value for key, future in found.items()}


def write_ts(
    directory: Path | str, database: Mapping[bytes, bytes], *, commits: int = 1, **config: Any
) -> None:
    store = open_ts(directory, config=config)
    items = list(database.items())
    for i in range(commits):
        with ts.Transaction(atomic=True) as txn:
            into = store.with_transaction(txn)
            for key, value in items[i::commits]:
                into.write(key, value).result()


# Our writer, TensorStore's reader.


@examples(60)
@example(database={b"": b"", LONGEST: b"x" * 2000}, inline=1024)
@given(database=databases, inline=st.sampled_from([-1, 0, 1024, 1 << 20]))
def test_tensorstore_reads_what_we_write(database: dict[bytes, bytes], inline: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = write(directory, database, inline=inline)
        assert root.height == 0
        assert root.counts[0] == len(database)
        assert read_ts(directory) == database
        assert read(directory) == database


@examples(30)
@given(database=databases.filter(len), leaf_bytes=st.sampled_from([1, 100, 400]))
def test_tensorstore_reads_our_interior_nodes(
    database: dict[bytes, bytes], leaf_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = write(directory, database, leaf_bytes=leaf_bytes)
        if leaf_bytes == 1:  # one entry per leaf
            assert root.height == (len(database) > 1)
        assert read_ts(directory) == database
        assert read(directory) == database


def test_a_key_that_is_not_there_is_not_found_in_our_tree(tmp_path: Path) -> None:
    write(tmp_path, {b"a/%d" % i: b"v" for i in range(0, 200, 2)}, leaf_bytes=200)
    store = open_ts(tmp_path)
    for key in (b"", b"a", b"a/1", b"a/101", b"a/2\0", b"zz"):
        assert store.read(key).result().state == "missing"
    some = ts.KvStore.KeyRange("a/10", "a/12")
    assert sorted(store.list(some).result()) == sorted(
        [b"a/10", *(b"a/%d" % i for i in range(100, 120, 2))]
    )


def test_a_tree_of_100_000_keys(tmp_path: Path) -> None:
    rng = random.Random(0)
    database = {b"params.layers_%06d.kernel/c/0/0" % i: rng.randbytes(40) for i in range(100_000)}
    root = write(tmp_path, database, leaf_bytes=10_000)
    assert (root.height, root.counts[0], root.counts[2]) == (1, 100_000, 0)
    assert root.counts[1] == Path(tmp_path, FILE).stat().st_size
    assert read(tmp_path) == database
    store = open_ts(tmp_path)
    assert sorted(store.list().result()) == sorted(database)
    for key in rng.sample(sorted(database), 200):
        assert store.read(key).result().value == database[key]


def test_an_ordinary_tree_is_one_leaf_and_a_large_one_is_split_evenly() -> None:
    entries = [(b"%08d" % i, bytes(1000)) for i in range(20_000)]
    blobs, root = ocdbt.encode_nodes(entries[:8000], file=FILE, offset=0)
    assert (len(blobs), root.height) == (1, 0)
    blobs, root = ocdbt.encode_nodes(entries, file=FILE, offset=7)
    assert (len(blobs), root.height, root.offset) == (4, 1, 7 + sum(map(len, blobs[:-1])))
    leaves = [len(blob) for blob in blobs[:-1]]
    assert max(leaves) - min(leaves) < 2000
    assert max(leaves) < 8 << 20


def test_an_empty_database_from_both_sides(tmp_path: Path) -> None:
    blobs, root = ocdbt.encode_nodes([], file=FILE, offset=64)
    assert (blobs, root) == ([], EMPTY_ROOT)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write(ours, {})
    assert read_ts(ours) == {}
    write_ts(theirs, {b"a": b"x"})
    open_ts(theirs).delete_range(ts.KvStore.KeyRange()).result()
    for directory in (ours, theirs):
        assert ocdbt.decode_manifest((directory / "manifest.ocdbt").read_bytes()) == EMPTY_ROOT
        assert entries_of(directory) == []


def test_tensorstore_goes_on_writing_our_database(tmp_path: Path) -> None:
    database = {b"%03d" % i: b"x" * i * 10 for i in range(200)}
    write(tmp_path, database, leaf_bytes=1000)
    store = open_ts(tmp_path)
    store.write("zzz", b"new").result()
    store.delete_range(ts.KvStore.KeyRange("050", "060")).result()
    wanted = {k: v for k, v in database.items() if not b"050" <= k < b"060"} | {b"zzz": b"new"}
    assert read(tmp_path) == read_ts(tmp_path) == wanted


# TensorStore's writer, our reader.

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "orbax": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000},
    "uncompressed": {"compression": None},
    "small nodes": {"max_decoded_node_bytes": 300},
    "small uncompressed nodes": {"max_decoded_node_bytes": 1, "compression": None},
    "all inline": {"max_inline_value_bytes": 1 << 20, "compression": {"id": "zstd", "level": 9}},
    "none inline": {"max_inline_value_bytes": 0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_tensorstore_writes(name: str) -> None:
    @examples(15)
    @given(database=databases, commits=st.sampled_from([1, 1, 3, 40]))
    def check(database: dict[bytes, bytes], commits: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            write_ts(directory, database, commits=min(commits, len(database)), **CONFIGS[name])
            if database:
                assert read(directory) == database

    check()


def test_we_read_high_trees_in_many_files_and_generations(tmp_path: Path) -> None:
    database = {b"layer/%04d" % (i * 7919 % 10_000): b"v%d" % i * (i % 37) for i in range(600)}
    write_ts(tmp_path, database, commits=60, max_decoded_node_bytes=500)
    assert ocdbt.decode_manifest((tmp_path / "manifest.ocdbt").read_bytes()).height >= 2
    files = {v.file for _, v in entries_of(tmp_path) if isinstance(v, ValueRef)}
    assert len(files) >= 50
    assert read(tmp_path) == database


def test_a_database_merged_from_others_has_base_paths(tmp_path: Path) -> None:
    """Orbax writes one database per process and merges their indices."""
    context = ts.Context()
    config = {"max_decoded_node_bytes": 400}
    database: dict[bytes, bytes] = {}
    parent = open_ts(tmp_path, context=context, config=config)
    for process in range(3):
        part = {b"p%d/%03d" % (process, i): b"%d" % i * 100 for i in range(100)}
        directory = tmp_path / f"ocdbt.process_{process}"
        child = open_ts(directory, context=context, config=config)
        for key, value in part.items():
            child.write(key, value).result()
        with ts.Transaction(atomic=True) as txn:
            child.experimental_copy_range_to(parent.with_transaction(txn)).result()
        database |= part
    found = entries_of(tmp_path)
    files = {v.file for _, v in found if isinstance(v, ValueRef)}
    assert {file.split("/d/")[0] for file in files} == {f"ocdbt.process_{i}" for i in range(3)}
    assert read(tmp_path) == database


def test_numbered_manifests_are_left_to_tensorstore(tmp_path: Path) -> None:
    write_ts(tmp_path, {b"a": b"x"}, manifest_kind="numbered")
    manifest = (tmp_path / "manifest.ocdbt").read_bytes()
    with pytest.raises(
        ocdbt.NumberedManifestError,
        match=r"some/manifest: manifest kind: found 1 \(numbered\), expected 0 \(single\): "
        "the versions are in other files",
    ):
        ocdbt.decode_manifest(manifest, what="some/manifest")


# What the writer refuses.


def test_keys_and_values_beyond_the_limits_are_refused() -> None:
    def encode(*entries: ocdbt.Entry, file: str = FILE) -> None:
        ocdbt.encode_nodes(entries, file=file, offset=0)

    encode((LONGEST, bytes(1 << 20)))
    with pytest.raises(FormatError, match="key b'k+': found 65536 bytes, expected at most 65535"):
        encode((LONGEST + b"k", b""))
    with pytest.raises(
        FormatError, match="key b'b': found a value of 1048577 bytes, expected at most"
    ):
        encode((b"a", b""), (b"b", bytes((1 << 20) + 1)))
    with pytest.raises(DuplicateNameError, match="key b'b' occurs twice"):
        encode((b"a", b""), (b"b", b""), (b"b", b""))
    with pytest.raises(FormatError, match="key b'a': found after b'b', expected before it"):
        encode((b"b", b""), (b"a", b""))
    with pytest.raises(FormatError, match=r"found ValueRef.*, expected a file and an end below"):
        encode((b"a", ValueRef(FILE, 2**63 - 10, 10)))
    with pytest.raises(FormatError, match=r"found ValueRef\(.*offset=-1, .*, expected a file"):
        encode((b"a", ValueRef(FILE, -1, 10)))
    with pytest.raises(FormatError, match=r"found ValueRef\(file='', .*, expected a file"):
        encode((b"a", ValueRef("", 0, 1)))
    for path in ("/d/1", "../d/1", "d/../../1", "d/\0", "d/", "é" * 32_768):
        with pytest.raises(FormatError, match="expected a relative path inside the directory"):
            encode((b"a", ValueRef(path, 0, 1)))
        with pytest.raises(FormatError, match=r"B\+tree: file path: found"):
            encode((b"a", b""), file=path)


# Damage.


def decode_node(blob: bytes, root: NodeRef) -> list[ocdbt.Entry]:
    """The entries of a database whose only node is `blob`."""
    return list(ocdbt.read_tree(root, lambda file, offset, length: blob).items())


def small() -> tuple[bytes, bytes, NodeRef, list[ocdbt.Entry]]:
    """A manifest, its only node, the reference to that, and its entries."""
    entries: list[ocdbt.Entry] = [
        (b"a.b/c/0", ValueRef(FILE, 0, 300)),
        (b"a.b/zarr.json", b"{}"),
        (b"a.c/c/0", ValueRef("p/" + FILE, 1 << 40, 5)),
    ]
    (blob,), root = ocdbt.encode_nodes(entries, file=FILE, offset=4096)
    return ocdbt.encode_manifest(root, uuid=UUID, commit_time_ns=5), blob, root, entries


def test_a_flipped_bit_anywhere_is_damage() -> None:
    manifest, node, root, entries = small()
    assert ocdbt.decode_manifest(manifest) == root
    assert root == NodeRef(0, FILE, 4096, len(node), counts=(3, len(node), 305))
    assert decode_node(node, root) == entries
    for i in range(8 * len(manifest)):
        bad = bytearray(manifest)
        bad[i // 8] ^= 1 << i % 8
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.ocdbt: found .*, expected "):
            ocdbt.decode_manifest(bytes(bad))
    for i in range(8 * len(node)):
        bad = bytearray(node)
        bad[i // 8] ^= 1 << i % 8
        with pytest.raises(DamagedCheckpointError, match=rf"B\+tree node {FILE}\[4096:.*expected "):
            decode_node(bytes(bad), root)


@examples(25)
@given(database=databases.filter(len), data=st.data())
def test_damage_to_tensorstores_files_is_found(
    database: dict[bytes, bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_ts(directory, database, max_inline_value_bytes=1 << 20)
        path = Path(directory, "manifest.ocdbt")
        root = ocdbt.decode_manifest(path.read_bytes())
        if data.draw(st.booleans()):
            path = Path(directory, root.file)
        content = bytearray(path.read_bytes())
        first = root.offset if path.name != "manifest.ocdbt" else 0
        size = root.length if first or path.name != "manifest.ocdbt" else len(content)
        # TensorStore's files differ from run to run in size, what is drawn must not.
        position = first + data.draw(st.integers(0, 2**20)) % size
        content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=r"found .*, expected"):
            read(directory)


def test_every_truncation_is_damage() -> None:
    manifest, node, root, _ = small()
    for n in range(len(manifest)):
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.ocdbt: found .*, expected"):
            ocdbt.decode_manifest(manifest[:n])
    for n in range(len(node)):
        with pytest.raises(DamagedCheckpointError, match=r"B\+tree node .*: found .*, expected"):
            decode_node(node[:n], root)
    with pytest.raises(DamagedCheckpointError, match=f"found 60 bytes, expected {len(node)}"):
        decode_node(node[:60], root)
    with pytest.raises(
        DamagedCheckpointError, match=r"\+tree.*found magic 0cdb3a2a, expected 0cdb2"
    ):
        decode_node(manifest, root)


# Hostile input: valid checksums over anything.


def frame(*parts: bytes | int, magic: bytes = ocdbt.NODE_MAGIC) -> bytes:
    """A frame with a valid checksum; integers are encoded as varints."""
    raw = [wire.encode_varints([p]) if isinstance(p, int) else p for p in parts]
    return wire.encode_frame(magic, *raw)


def recompressed(blob: bytes, *, known_size: bool) -> bytes:
    """The same frame with a zstd body."""
    if known_size:
        body = zstandard.ZstdCompressor().compress(blob[14:-4])
    else:
        stream = zstandard.ZstdCompressor().compressobj()
        body = stream.compress(blob[14:-4]) + stream.flush()
    head = blob[:4] + (18 + len(body)).to_bytes(8, "little") + b"\0\1"
    return head + body + crc32c.crc32c(head + body).to_bytes(4, "little")


def leaf_ref(blob: bytes, num_keys: int = 1, **fields: Any) -> NodeRef:
    return NodeRef(0, "d/x", 0, len(blob), counts=(num_keys, 0, 0), **fields)


def leaf(files: bytes, *rest: bytes | int) -> bytes:
    return frame(b"\0", files, *rest)


FILES = wire.encode_files(["d/x"])

HOSTILE_LEAVES: dict[str, tuple[bytes, str]] = {
    "no entries": (leaf(FILES, 0), "found 0 keys, expected 1"),
    "entry count": (leaf(FILES, 2**40), "key count: found 1099511627776, expected at most 10485"),
    "entries cut": (leaf(FILES, 1 << 20), "key prefix length: found 0 numbers in 0 bytes, expecte"),
    "key length": (
        leaf(FILES, 1, 65_536),
        "key suffix length: found 65536, expected at most 65535",
    ),
    "keys cut": (leaf(FILES, 1, 9, b"abc"), "key bytes: found 3 bytes, expected 9 bytes"),
    "key prefix": (leaf(FILES, 2, 4, 3, 3, b"abcdef"), "key prefix: found one beyond the str"),
    "key order": (
        leaf(FILES, 2, 0, 1, 1, b"ba", 0, 0, b"\0\0"),
        "found keys out of order, expected str",
    ),
    "equal keys": (
        leaf(FILES, 2, 1, 1, 0, b"b", 0, 0, b"\0\0"),
        "found keys out of order, expected str",
    ),
    "value kind": (leaf(FILES, 1, 1, b"a", 0, b"\2"), "value kind: found 2, expected 0 or 1"),
    "inline length": (
        leaf(FILES, 1, 1, b"a", 1 << 60, b"\0"),
        "inline value: found 0 bytes, expected 1152921504606846976 bytes",
    ),
    "inline cut": (
        leaf(FILES, 1, 1, b"a", 4, b"\0xyz"),
        "inline value: found 3 bytes, expected 4",
    ),
    "inline more": (leaf(FILES, 1, 1, b"a", 1, b"\0xyz"), "end: found 2 more bytes, expected none"),
    "file id": (leaf(FILES, 1, 1, b"a", 4, b"\1", 1, 0), "file id: found 1, expected at most 0"),
    "no files": (leaf(b"\0", 1, 1, b"a", 4, b"\1", 0, 0), "file id: found 0, expected at most -1"),
    "empty path": (
        leaf(wire.encode_files([""]), 1, 1, b"a", 4, b"\1", 0, 0),
        r"found ValueRef\(file='', .*, expected a file and an end below",
    ),
    "range": (
        leaf(FILES, 1, 1, b"a", 2**63 - 1, b"\1", 0, 1),
        r"found ValueRef\(file='d/x', .*, expected a file and an end below",
    ),
    "length": (leaf(FILES, 1, 1, b"a", 2**63), f"value length: found {2**63}, expected at most"),
    "11 bytes": (
        leaf(FILES, 1, 1, b"a", b"\x80" * 10 + b"\1"),
        "value length: found 0 numbers in ",
    ),
    "11 of 20": (
        leaf(FILES, 2, 0, 1, 1, b"ab", b"\x80" * 10 + b"\1\1"),
        "value length: found a number above 64 bits, expected",
    ),
    "65 bits": (leaf(FILES, 1, 1, b"a", b"\xff" * 9 + b"\2"), "a number above 64 bits, expected"),
    "file count": (
        leaf(wire.encode_varints([1 << 60])),
        "data file count: found 11529215046068469",
    ),
    "files cut": (leaf(b"\2\0"), "data file suffix length: found 0 numbers in 0 bytes, expected 2"),
    "path cut": (leaf(b"\1\5\0", b"abc"), "data file bytes: found 3 bytes, expected 5"),
    "base length": (leaf(b"\1\3\4", b"abc"), "data file prefix: found one beyond the s"),
    "not UTF-8": (leaf(b"\1\3\0", b"d/\xff"), r"file path: found b'd/\\xff', expected UTF-8"),
    "base splits UTF-8": (leaf(b"\1\4\3", "d/é".encode()), r"\\xc3', expected UTF-8"),
    "num_keys": (leaf(FILES, 2, 0, 1, 1, b"ab", 0, 0, b"\0\0"), "found 2 keys, expected 1"),
}


@pytest.mark.parametrize("name", HOSTILE_LEAVES)
def test_hostile_leaves(name: str) -> None:
    blob, message = HOSTILE_LEAVES[name]
    for known_size in (None, True, False):
        data = blob if known_size is None else recompressed(blob, known_size=known_size)
        with pytest.raises(FormatError, match=message) as info:
            decode_node(data, leaf_ref(data))
        assert str(info.value).startswith("B+tree node d/x[0:")
        assert info.type is FormatError  # the bytes are as written: no damage


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..", "../x", "d/../../x", "d/..", "a\0b", "d/", "a/../b"]
)
def test_paths_that_leave_the_directory_are_refused(path: str) -> None:
    files = wire.encode_files([path])
    blob = leaf(files, 1, 1, b"a", 4, b"\1", 0, 0)
    with pytest.raises(FormatError, match=r"d/x\[0.*file path: found .* relative path inside"):
        decode_node(blob, leaf_ref(blob))
    with pytest.raises(FormatError, match=r"^manifest.ocdbt: file path: found "):
        ocdbt.decode_manifest(manifest_of(files, *version()))
    if not path.startswith("/"):  # "base/" + "/etc/passwd" stays inside
        with pytest.raises(FormatError, match=r"file path: found 'base/.* relative path insi"):
            decode_node(blob, leaf_ref(blob, base="base/"))


def test_a_path_that_a_base_path_moves_outside_is_refused() -> None:
    blob = leaf(wire.encode_files(["./x"]), 1, 1, b"a", 4, b"\1", 0, 0)
    (entry,) = decode_node(blob, leaf_ref(blob, base="sub/"))
    assert entry == (b"a", ValueRef("sub/./x", 0, 4))
    with pytest.raises(FormatError, match=r"found 'a/\.\./x', expected a relative path inside"):
        decode_node(blob, leaf_ref(blob, base="a/."))


def manifest_of(files: bytes, *versions: bytes | int) -> bytes:
    config = (UUID, b"\0", 1024, 100_000_000, b"\4", 0)
    return frame(*config, files, *versions, magic=ocdbt.MANIFEST_MAGIC)


def version(*, file: int = 0, offset: int = 5, length: int = 50, **more: int) -> list[bytes | int]:
    """One inline version and no version nodes."""
    height = bytes([more.get("height", 0)])
    counts = (more.get("keys", 1), length, 0)
    generation = more.get("generation", 1)
    return [1, generation, height, file, offset, length, *counts, bytes(8), 0]


HOSTILE_MANIFESTS: dict[str, tuple[bytes, str]] = {
    "no version": (manifest_of(FILES, 0), "version count: found 0, expected at least 1"),
    "file": (manifest_of(FILES, *version(file=1)), "data file id: found 1, expected at most 0"),
    "cut": (manifest_of(FILES, *version()[:-3]), "root place: found 0 numbers in 0 bytes, exp"),
    "kind": (frame(UUID, b"\2", magic=ocdbt.MANIFEST_MAGIC), "manifest kind: found 2, expected at"),
    "config": (frame(b"abc", magic=ocdbt.MANIFEST_MAGIC), "uuid: found 3 bytes, expected 16 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_hostile_manifests(name: str) -> None:
    blob, message = HOSTILE_MANIFESTS[name]
    with pytest.raises(FormatError, match=f"^run/manifest: {message}") as info:
        ocdbt.decode_manifest(blob, what="run/manifest")
    assert info.type is FormatError


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        (["d/x"], {"offset": 2**64 - 1}, "expected a file and an end below"),
        (
            ["d/x"],
            {"length": 1 << 60},
            r"found a node of 11529\d* bytes in a tree of .* at most 134",
        ),
        ([""], {}, "found 0 keys, expected 1"),
    ],
)
def test_hostile_roots(files: list[str], fields: dict[str, int], message: str) -> None:
    manifest = manifest_of(wire.encode_files(files), *version(**fields))
    with pytest.raises(FormatError, match=message):
        ocdbt.read_tree(ocdbt.decode_manifest(manifest), lambda *_: pytest.fail("fetched"))


def test_unknown_versions_and_compressions_are_refused() -> None:
    blob = small()[1]
    for at, name in ((12, "compression 0200"), (13, "compression 0002")):
        bad = bytearray(blob[:-4])
        bad[at] = 2
        bad += crc32c.crc32c(bytes(bad)).to_bytes(4, "little")
        with pytest.raises(FormatError, match=f"found version and {name}, expected 0000 or"):
            decode_node(bytes(bad), leaf_ref(bytes(bad)))


@pytest.mark.parametrize("known_size", [True, False])
def test_a_zstd_bomb_does_not_grow_beyond_the_limit(
    known_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = recompressed(frame(bytes(400 << 20)), known_size=known_size)
    assert len(bomb) < 100_000
    limit = 8 << 20
    monkeypatch.setattr(wire, "MAX_NODE", limit)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"expected at most 8388608|of at most 8388608 bytes"):
            decode_node(bomb, leaf_ref(bomb))
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
    finally:
        tracemalloc.stop()


def test_a_zstd_body_that_is_cut_or_has_a_tail_is_damage() -> None:
    blob = recompressed(small()[1], known_size=True)
    for body in (blob[14:-5], blob[14:-4] + b"x", b"", b"\x28\xb5\x2f\xfd"):
        head = blob[:4] + (18 + len(body)).to_bytes(8, "little") + b"\0\1"
        bad = head + body + crc32c.crc32c(head + body).to_bytes(4, "little")
        with pytest.raises(DamagedCheckpointError, match="found a bad zstd body, expected one fr"):
            decode_node(bad, leaf_ref(bad))


def test_a_prefix_bomb_is_refused_before_it_grows() -> None:
    """20,000 keys of 65,535 bytes, each of which shares all but the last byte or two."""
    count = 20_000
    shared = wire.encode_varints([65_533] * (count - 1))
    suffix = wire.encode_varints([65_535] + [2] * (count - 1))
    tail = b"".join(i.to_bytes(2, "big") for i in range(count))
    blob = leaf(FILES, count, shared, suffix, bytes(65_533), tail, bytes(2 * count))
    assert len(blob) < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(
            FormatError, match="key bytes: found 65535 and 1310700000 in all, expected"
        ):
            decode_node(blob, leaf_ref(blob, count))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# Hostile trees.


class Disk:
    """Nodes by offset in one data file, built bottom up."""

    def __init__(self) -> None:
        self.data = b""
        self.reads = 0

    def add(self, blob: bytes) -> tuple[int, int]:
        self.data += blob
        return len(self.data) - len(blob), len(blob)

    def fetch(self, file: str, offset: int, length: int) -> bytes:
        assert file == "d/x"
        self.reads += 1
        return self.data[offset : offset + length]

    def read(self, root: NodeRef) -> list[ocdbt.Entry]:
        return list(ocdbt.read_tree(root, self.fetch).items())


def interior(height: int, *children: tuple[bytes, int, tuple[int, int], int]) -> bytes:
    """Children as (key, subtree prefix length, (offset, length), num_keys)."""
    names = [key for key, *_ in children]
    columns = [
        [0] * (len(names) - 1),
        [len(name) for name in names],
        [prefix for _, prefix, *_ in children],
    ]
    places = [place for *_, place, _ in children]
    tail = [
        [0] * len(names),
        [offset for offset, _ in places],
        [length for _, length in places],
        [count for *_, count in children],
        [0] * (2 * len(names)),
    ]
    lead = [number for column in columns for number in column]
    rest = [number for column in tail for number in column]
    return frame(bytes([height]), FILES, len(names), *lead, b"".join(names), *rest)


def simple_leaf(*names: bytes) -> bytes:
    lengths = [len(name) for name in names]
    head: list[int] = [len(names), *[0] * (len(names) - 1), *lengths]
    return leaf(FILES, *head, b"".join(names), *[0] * len(names), bytes(len(names)))


def root_ref(place: tuple[int, int], height: int, num_keys: int) -> NodeRef:
    return NodeRef(height, "d/x", *place, counts=(num_keys, 0, 0))


def test_the_hand_made_trees_are_valid_before_they_are_broken() -> None:
    disk = Disk()
    low, high = disk.add(simple_leaf(b"1", b"2")), disk.add(simple_leaf(b"b3", b"b4"))
    root = disk.add(interior(1, (b"a1", 1, low, 2), (b"b", 0, high, 2)))
    names = [key for key, _ in disk.read(root_ref(root, 1, 4))]
    assert names == [b"a1", b"a2", b"b3", b"b4"]


def test_a_node_that_refers_to_itself_is_refused() -> None:
    blob = interior(1, (b"", 0, (0, 0), 1))
    for _ in range(3):  # the length is part of what it depends on
        blob = interior(1, (b"", 0, (0, len(blob)), 1))
    disk = Disk()
    place = disk.add(blob)
    with pytest.raises(FormatError, match=r"node d/x\[0:\d+\]: found twice in the tree"):
        disk.read(root_ref(place, 1, 1))
    assert disk.reads == 1


def test_a_tree_that_repeats_one_node_is_refused() -> None:
    disk = Disk()
    place = disk.add(simple_leaf(b""))
    for height in range(1, 7):
        children = [(bytes([i]), 1, place, 256 ** (height - 1)) for i in range(256)]
        place = disk.add(interior(height, *children))
    assert len(disk.data) < 30_000
    with pytest.raises(FormatError, match="found twice in the tree, expected once"):
        disk.read(root_ref(place, 6, 256**6))
    assert disk.reads < 10


def test_a_small_node_of_large_values_counts_for_what_it_decodes_to() -> None:
    disk = Disk()
    blob = recompressed(leaf(FILES, 1, 0, 1 << 20, b"\0", bytes(1 << 20)), known_size=True)
    places = [disk.add(blob) for _ in range(200)]
    children = [(bytes([i]), 1, place, 1) for i, place in enumerate(places)]
    with pytest.raises(FormatError, match="in a tree of"):
        disk.read(root_ref(disk.add(interior(1, *children)), 1, 200))
    assert 64 <= disk.reads < 120


def test_trees_whose_nodes_do_not_fit_together_are_refused() -> None:
    def read(*children: Any, keys: int = 2) -> None:
        disk.read(root_ref(disk.add(interior(1, *children)), 1, keys))

    disk = Disk()
    a, b = disk.add(simple_leaf(b"a")), disk.add(simple_leaf(b"b"))
    end = len(disk.data)
    for children in (
        [(b"", 0, b, 1), (b"a", 0, a, 1)],
        [(b"a", 0, b, 1), (b"b", 0, b, 1)],
        [(b"b", 0, b, 1), (b"a", 0, a, 1)],
    ):
        with pytest.raises(FormatError, match=r"d/x\[.*: found (keys out of order|twice)"):
            read(*children)
    with pytest.raises(FormatError, match=r"d/x\[.*: found 2 keys, expected 3"):
        read((b"a", 0, a, 1), (b"b", 0, b, 1), keys=3)
    with pytest.raises(FormatError, match="key prefix: found one beyond the string"):
        read((b"a", 2, a, 1), keys=1)
    with pytest.raises(DamagedCheckpointError, match=r"\[9000000:.* found magic , expected"):
        read((b"a", 0, (9_000_000, 40), 1), keys=1)
    with pytest.raises(FormatError, match=f"found a node of {2**60} bytes in a tree"):
        read((b"a", 0, (end, 2**60), 1), keys=1)
    with pytest.raises(FormatError, match=r"found NodeRef\(.*, expected a file and an end"):
        read((b"a", 0, (2**62, 2**62), 1), keys=1)


def test_a_key_above_the_limit_through_its_prefix_is_refused() -> None:
    disk = Disk()
    place = disk.add(simple_leaf(b"k"))
    root = disk.add(interior(1, (LONGEST, 65_535, place, 1)))
    with pytest.raises(FormatError, match="key bytes: found 65536 and 65536 in all, expe"):
        disk.read(root_ref(root, 1, 1))


# Fuzz: whatever the bytes, only our errors come out.


def mutations(body: bytes) -> st.SearchStrategy[bytes]:
    at = st.integers(0, len(body))
    edit = st.tuples(at, st.integers(0, 6), st.binary(max_size=4))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        out = body
        for where, cut, new in edits:
            out = out[:where] + new + out[where + cut :]
        return out

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def decode_children(blob: bytes) -> list[NodeRef]:
    root = NodeRef(1, "d/x", 0, len(blob))
    node = ocdbt._open_node(blob, root)  # pyright: ignore[reportPrivateUsage]
    return ocdbt._children(*node, height=0)  # pyright: ignore[reportPrivateUsage]


def decode(kind: str, blob: bytes) -> None:
    if kind == "manifest":
        ocdbt.decode_manifest(blob)
        return
    if kind == "interior":  # without its children
        children = decode_children(blob)
        assert all(child.height == 0 and child.file for child in children)
    else:
        entries = decode_node(blob, leaf_ref(blob, 3))
        assert all(a < b for (a, _), (b, _) in pairwise(entries))


def interior_node() -> bytes:
    entries: list[ocdbt.Entry] = [(b"name/%d" % i, b"v") for i in range(3)]
    blobs, root = encode_nodes(entries, 0, 1)
    assert (root.height, root.counts[0]) == (1, 3)
    return blobs[-1]


BODIES = {"manifest": small()[0], "leaf": small()[1], "interior": interior_node()}


@pytest.mark.parametrize(("kind", "blob"), BODIES.items(), ids=BODIES)
def test_fuzz(kind: str, blob: bytes) -> None:
    outcomes: dict[str, int] = {"ok": 0, "error": 0}

    @examples(400)
    @given(body=st.one_of(mutations(blob[14:-4]), st.binary(max_size=60)))
    def check(body: bytes) -> None:
        data = wire.encode_frame(blob[:4], body)
        try:
            decode(kind, data)
            outcomes["ok"] += 1
        except FormatError:
            outcomes["error"] += 1

    check()
    assert outcomes["error"] > 100


@examples(200)
@given(data=st.binary(max_size=80), head=st.sampled_from([b"", b"\x0c\xdb\x3a\x2a"]))
def test_garbage_is_damage(data: bytes, head: bytes) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"found .*, expected"):
        ocdbt.decode_manifest(head + data)


@pytest.mark.parametrize(("kind", "blob"), BODIES.items(), ids=BODIES)
def test_every_truncated_body_with_a_valid_checksum_is_an_error(kind: str, blob: bytes) -> None:
    # The versions of a manifest before the newest one follow it; we do not read them.
    body = blob[14:-4] if kind != "manifest" else blob[14:-13]
    decode(kind, blob)
    for n in range(len(body)):
        data = wire.encode_frame(blob[:4], body[:n])
        with pytest.raises(FormatError, match=r"found .*, expected"):
            decode(kind, data)


# The parts.


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), max_size=50))
def test_varints_are_leb128(numbers: list[int]) -> None:
    encoded = wire.encode_varints(numbers)
    assert encoded == b"".join(map(leb128, numbers))
    reader = wire.Reader(b"x" + encoded + b"y", "test")
    reader.take(1, "start")
    assert reader.varints(len(numbers), "numbers").tolist() == numbers
    assert reader.take(1, "rest") == b"y"
    reader.finish()


def leb128(number: int) -> bytes:
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + leb128(number >> 7)


def test_varints_by_hand() -> None:
    assert wire.encode_varints([]) == b""
    assert wire.encode_varints([0, 300, 1]) == b"\0\xac\x02\1"
    assert wire.encode_varints([2**64 - 1]) == b"\xff" * 9 + b"\1"
    top = wire.Reader(b"\xff" * 9 + b"\1", "test").varint("n", 2**64 - 1)
    assert top == 2**64 - 1


@given(st.lists(st.binary(max_size=9), max_size=8), st.binary(max_size=3), st.booleans())
def test_strings_that_share_prefixes(strings: list[bytes], prefix: bytes, marked: bool) -> None:
    """As TensorStore writes them: each without what it shares with the one before."""
    shared = [len(os.path.commonprefix([a, b])) for a, b in pairwise(strings)]  # noqa: RUF071
    rests = [b[n:] for n, b in zip([0, *shared], strings, strict=False)]
    marks = [len(b) // 2 for b in strings]
    numbers = [len(strings), *shared, *map(len, rests), *(marks if marked else [])]
    reader = wire.Reader(wire.encode_varints(numbers) + b"".join(rests), "test")
    found, places = reader.strings("key", prefix, marked=marked)
    reader.finish()
    assert found == [prefix + b for b in strings]
    assert places.tolist() == [len(prefix) + n * marked for n in marks]


@given(st.lists(st.text("ab/é", min_size=1, max_size=9), max_size=8), st.sampled_from(["", "p/"]))
def test_file_tables(paths: list[str], base: str) -> None:
    good = [p for p in paths if p[0] != "/" and p[-1] != "/"]
    found = wire.Reader(wire.encode_files(good), "test").files(base)
    assert found == [(base + p, base) for p in good]


def test_a_root_says_what_its_tree_holds() -> None:
    entries: list[ocdbt.Entry] = [(b"p/%05d" % i, ValueRef(FILE, 10 * i, 10)) for i in range(500)]
    blobs, root = encode_nodes(entries, 100, 2000)
    children = decode_children(blobs[-1])
    assert root.counts == (500, sum(map(len, blobs)), 5000)
    assert [child.length for child in children] == [*map(len, blobs[:-1])]
    assert (children[0].offset, root.offset) == (100, 100 + sum(map(len, blobs[:-1])))
    data = bytes(100) + b"".join(blobs)
    found = ocdbt.read_tree(root, lambda _, offset, size: data[offset : offset + size])
    assert list(found.items()) == entries
