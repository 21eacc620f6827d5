"""The crafted checkpoints of `torture/hostile.py`, and the calls that read them.

A case changes the step `100` of a run, which has two trees, a config, the position of an iterator
and metrics. `seal` then makes our checksums right, if the checkpoint has any.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import jax
import jax.numpy as jnp
import numpy as np
import zstandard

import flax_ckpt as fc
from flax_ckpt.format import names, ocdbt, wire
from flax_ckpt.format.checkpoint import Integrity, file_crc
from flax_ckpt.format.ocdbt import NodeRef, ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.record import Record

Change = Callable[[Path], None]
SECRET = "the content of a file that is none of the checkpoint's"
HUGE = 10**18
EVIL = "d/" + "e" * 32
# Options of `array.saving`, and whether the records that are ours alone are there.
BASES: dict[str, tuple[dict[str, bool], bool]] = {
    "ours": ({}, True),
    "another's": ({}, False),
    "ours, compressed": ({"use_compression": True}, True),
    "another's, compressed": ({"use_compression": True}, False),
    "ours, in files": ({"use_ocdbt": False}, True),
    "another's, in files": ({"use_ocdbt": False}, False),
    "ours, zarr 2": ({"use_ocdbt": False, "use_zarr3": False}, True),
    "another's, zarr 2": ({"use_ocdbt": False, "use_zarr3": False, "use_compression": True}, False),
}
BOTH = ("ours", "another's")
DATABASES = (*BOTH, "ours, compressed", "another's, compressed")


class Case(NamedTuple):
    """A crafted checkpoint: what is done to which base; `may_differ`: it may load as it says."""

    group: str
    title: str
    base: str
    change: Change
    may_differ: bool = False


class Position:
    """An iterator with a position."""

    def __init__(self) -> None:
        self.state: Any = {"row": 7, "order": np.arange(3), "pair": (1, b"x")}

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def make(place: Path) -> None:
    """Writes the bases, and beside them what no case may read or change."""
    outside = place / "outside"
    outside.mkdir()
    (outside / "secret").write_text(json.dumps({"secret": SECRET}))
    (outside / "canary").mkdir()
    (outside / "canary" / "file").write_text("alive")
    params = {
        "w": jnp.arange(6.0).reshape(2, 3),
        "n": np.arange(5),
        "key": jax.random.key(1),
        "name": "a string",
        "list": [1, 2.5, None, {}],
    }
    for base, (saving, ours) in BASES.items():
        context = fc.Context()
        for option, value in saving.items():
            setattr(context.array.saving, option, value)
        root = place / base / "run"
        with fc.CheckpointCallback(
            root,
            every_n_steps=1,
            keep_best=("loss", "min", 1),
            config={"rate": 0.5, "layers": (1, 2), "dtype": jnp.bfloat16},
            data_iterator=Position(),
            context=context,
        ) as callback:
            callback.on_step_end(100, {"params": params, "step": 100}, metrics={"loss": 0.5})
        if not ours:
            for record in (*root.rglob(names.INTEGRITY), *root.rglob(names.CHUNK_TABLE)):
                record.unlink()


def _step(root: str) -> str:
    """The step that a case changed; one that it renamed is found as well."""
    found = [name for name in os.listdir(root) if name.isdigit()]
    return f"{root}/{found[0] if found else 100}"


def _load_all(root: str) -> Any:
    wanted: dict[str, Any] = {"params": None, "train_state": None, "config": None}
    return fc.load_checkpointables(_step(root), wanted | {"data": Position()})


def _restore(root: str, **named: Any) -> Any:
    out = fc.restore(root, **named)
    return out.state, out.step, out.metrics, out.config_text, str(out.config), out.provenance


def _position(root: str) -> Any:
    iterator = Position()
    fc.restore(_step(root), data_iterator=iterator)
    return iterator


def _listed(root: str) -> Any:
    with fc.training.Checkpointer(root) as run:
        found = [(c.step, c.metrics, c.custom_metadata, c.time, repr(c)) for c in run.checkpoints]
        return [(*one[:3], bool(one[3])) for one in found], run.root_metadata()


CALLS: dict[str, Callable[[str], Any]] = {
    "load": lambda root: fc.load(_step(root), checkpointable_name="params"),
    "load_checkpointables": _load_all,
    "metadata": lambda root: fc.metadata(_step(root), "params").metadata,
    "checkpointables_metadata": lambda root: str(fc.checkpointables_metadata(_step(root)))[:9000],
    "restore": _restore,
    "restore of the position": _position,
    "best": lambda root: fc.restore(root, step="best").step,
    "listing": _listed,
    "delete": lambda root: fc.delete(_step(root), checkpointable_name="data"),
}


def text_of(value: Any, depth: int = 0) -> str:
    """A result as text, the arrays by a hash; with the secret if it is anywhere in it."""
    if depth > 150:
        return "…"
    if isinstance(value, dict):
        pairs = (f"{str(k)[:99]!r}: {text_of(v, depth + 1)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text_of(item, depth + 1) for item in value) + "]"
    if isinstance(value, Position):
        return text_of(value.state, depth + 1)
    if isinstance(value, jax.Array | np.ndarray):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if is_key else value)
        data = array.tobytes() if array.nbytes < 1 << 20 else b"large"
        told = SECRET if SECRET.encode() in data else ""
        return f"{value.shape} {value.dtype} {hashlib.sha1(data).hexdigest()} {told}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 20_000 else f"{len(text)} {SECRET if SECRET in text else ''}"


# What cases are made with.


def seal(step: Path) -> None:
    """Makes the checksums in `flax_ckpt.json` those of the files that are there."""
    path = step / names.INTEGRITY
    if path.is_file() and not path.is_symlink():
        old = Integrity.from_bytes(path.read_bytes(), "")
        new = dict(old.crc32c)
        for name in old.crc32c:
            file = step / name
            if file.is_file() and not file.is_symlink():
                new[name] = file_crc(file.read_bytes())
        path.write_bytes(Integrity(new, old.writers).to_bytes())


def with_line(body: bytes) -> bytes:
    """`flax_ckpt.json` of that first line."""
    return body + b"\n" + f'"{crc32c.crc32c(body):08x}"\n'.encode()


def put(name: str, data: bytes | Callable[[], bytes]) -> Change:
    """A file gets other bytes."""

    def change(step: Path) -> None:
        found = data() if callable(data) else data
        (step / name).write_bytes(with_line(found) if name == names.INTEGRITY else found)
        if name != names.INTEGRITY:
            seal(step)

    return change


def crcs_of(tree: Path, values: dict[bytes, Any]) -> list[int]:
    """What our table says of values: CRCs without the trailers of chunks."""
    found = list[int]()
    for key, value in values.items():
        data = value
        if isinstance(value, ValueRef):
            file = tree / value.file
            with_it = "\0" not in value.file and file.is_file() and value.length < 1 << 30
            data = file.read_bytes()[value.offset :][: value.length] if with_it else b""
        found.append(crc32c.crc32c(data if key.endswith(b".json") else data[:-4]))
    return found


def plant(step: Path, *blobs: bytes, keys: list[bytes] | None = None, **root: Any) -> None:
    """Nodes of the database of `params`, in a new file; the last, unless said otherwise, is root.

    Without `keys`, those of the table are left as they are.
    """
    tree = step / "params"
    (tree / EVIL).write_bytes(b"".join(blobs))
    place = {"offset": sum(map(len, blobs[:-1])), "length": len(blobs[-1]), "counts": (0, 0, 0)}
    ref = NodeRef(**{"height": 0, "file": EVIL, **place, **root})
    manifest = ocdbt.encode_manifest(ref, uuid=bytes(16), commit_time_ns=1)
    (tree / names.MANIFEST).write_bytes(manifest)
    seal(step)


def values_of(step: Path) -> dict[bytes, Any]:
    """The database of `params`."""
    with Database(Record(str(step / "params")), checked=False) as database:
        return dict(database.values)


def rewrite(step: Path, values: dict[bytes, Any]) -> None:
    """Gives `params` a database of these values, whatever they are, with a table to match."""
    entries = sorted(values.items())
    tree = step / "params"
    if (tree / names.CHUNK_TABLE).exists():
        crcs = crcs_of(tree, dict(entries))
        table = ocdbt.encode_table([key for key, _ in entries], crcs)
        (tree / names.CHUNK_TABLE).write_bytes(table)
    blob, _ = ocdbt._leaf(entries)
    plant(step, blob, counts=(len(entries), len(blob), 0))


def revalue(change: Callable[[dict[bytes, Any]], object]) -> Change:
    """Changes the values of the database of `params`."""

    def apply(step: Path) -> None:
        values = values_of(step)
        change(values)
        rewrite(step, values)

    return apply


def chunks(values: dict[bytes, Any]) -> list[bytes]:
    """Keys of values that are out of line."""
    return [key for key, value in values.items() if isinstance(value, ValueRef)]


def described(array: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the description of an array of `params`, wherever that is."""

    def apply(step: Path) -> None:
        for name in ("zarr.json", ".zarray"):
            file = step / "params" / array / name
            if file.is_file():
                document = json.loads(file.read_bytes())
                change(document)
                file.write_text(json.dumps(document))
                return seal(step)
        values, key = values_of(step), f"{array}/zarr.json".encode()
        document = json.loads(_bytes(step, values[key]))
        change(document)
        rewrite(step, values | {key: json.dumps(document).encode()})

    return apply


def _bytes(step: Path, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (step / "params" / value.file).read_bytes()[value.offset :][: value.length]


def with_table(files: list[bytes], *rest: bytes, height: int = 0) -> bytes:
    """A node whose table of data files holds any bytes."""
    table = wire.encode_strings(files, marked=True)
    return wire.encode_frame(ocdbt.NODE_MAGIC, bytes([height]), table, *rest)


def compressed(magic: bytes, body: bytes) -> bytes:
    """A node or manifest whose body is compressed."""
    packed = zstandard.ZstdCompressor(level=3).compress(body)
    length = (18 + len(packed)).to_bytes(8, "little")
    return wire.with_crc(magic + length + b"\0\1" + packed)


def parent(children: list[tuple[bytes, int, int]], height: int) -> bytes:
    """An interior node over (key, offset, length) in the same file, keys with no prefix."""
    keys = wire.encode_strings([key for key, _, _ in children], marked=False)
    count = len(children)
    marks = wire.encode_varints([len(key) for key, _, _ in children])
    # The marks stand between the lengths and the bytes of the keys.
    cut = len(keys) - sum(len(key) for key, _, _ in children)
    columns = [
        bytes(count),
        wire.encode_varints([offset for _, offset, _ in children]),
        wire.encode_varints([length for _, _, length in children]),
        bytes(3 * count),
    ]
    return with_table([EVIL.encode()], keys[:cut], marks, keys[cut:], *columns, height=height)


# The cases.


def cases(place: Path) -> list[Case]:
    """All of them, in the same order each time."""
    groups = (_texts, _fields, _tables, _nodes, _values, _arrays, _special, _named, _config)
    return [case for group in groups for case in group(place)]


DOCUMENTS = (
    "params/_METADATA",
    "params/_sharding",
    "params/array_metadatas/process_0",
    "params/_strings.json",
    names.CHECKPOINT_METADATA,
    names.DELETION_RECORD,
    "data/process_0-of-1.json",
    "metrics/metrics",
    names.INTEGRITY,
)
TEXTS: dict[str, bytes | Callable[[], bytes]] = {
    "a million lists in each other, open": b"[" * 10**6,
    "a million lists in each other": b"[" * 10**6 + b"]" * 10**6,
    "a million objects in each other": b'{"a":' * 10**6 + b"1" + b"}" * 10**6,
    "900 lists in an object": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "300 objects in each other": b'{"item_handlers":' * 300 + b"1" + b"}" * 300,
    "100 MB: one string": lambda: b'{"a":"' + b"x" * 10**8 + b'"}',
    "100 MB: empty lists": lambda: b'{"a":[' + b"[]," * 33_000_000 + b"[]]}",
    "100 MB: blanks": lambda: b" " * 10**8 + b"{}",
    "100 MB: wide characters": lambda: b'{"a":"' + "😀".encode() * 25_000_000 + b'"}',
    "10 MB: empty lists": lambda: b'{"a":[' + b"[]," * 3_300_000 + b"[]]}",
    "10 MB: empty lists and NaN": lambda: b'{"a":[NaN,' + b"[]," * 3_300_000 + b"[]]}",
    "10 MB: objects": lambda: b'{"a":[' + b'{"":1},' * 1_400_000 + b"{}]}",
    "a number of a million digits": b'{"a":' + b"1" * 10**6 + b"}",
    "nothing": b"",
    "NUL": b"\0" * 100,
    "no UTF-8": b'{"\xff\xfe": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a character": b'{"\\ud800": "\\udc00", "n": NaN}',
    **{f"only {text}": text.encode() for text in ("null", "1", '"x"', "[]", "[{}]", "{}", "NaN")},
}


def _texts(place: Path) -> Iterator[Case]:
    for base in BOTH:
        for name in DOCUMENTS:
            for title, data in TEXTS.items():
                if name != names.INTEGRITY or base == "ours":
                    yield Case(
                        "JSON texts", f"{base}: {name}: {title}", base, put(name, data), True
                    )


WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        1 << 70,
        10**400,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../../../outside",
    ),
    *(
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "²",
        "[" * 2000,
        [],
        {},
        [[[]]],
        {"a": {}},
        [None],
        [1, "x"],
    ),
)


def _fields(place: Path) -> Iterator[Case]:
    """Each field of each document with each kind of value; keys twice, and left out."""
    for base in ("ours", "another's", "ours, zarr 2", "another's, zarr 2", "another's, in files"):
        step = place / base / "run" / "100"
        array = "params/w/.zarray" if "zarr 2" in base else "params/w/zarr.json"
        for name in (*DOCUMENTS, *([] if base in BOTH else [array])):
            if name == names.DELETION_RECORD:
                metadata = json.loads((step / names.CHECKPOINT_METADATA).read_bytes())
                text = _deletion(metadata, "data")
            elif not (step / name).is_file():
                continue
            else:
                text = (step / name).read_bytes().partition(b"\n")[0].decode()
            document = json.loads(text)
            for path in _paths(document):
                title = f"{base}: {name}: {'/'.join(map(str, path))[:60]}"
                yield Case("fields", f"{title} missing", base, _edit(name, text, path), True)
                for value in WRONG:
                    change = _edit(name, text, path, value)
                    yield Case("fields", f"{title} = {value!r:.30}", base, change, True)
                if isinstance(path[-1], str):
                    change = _edit(name, text, (*path[:-1], f"{path[-1]}../x\0"), 1)
                    yield Case("fields", f"{title} and another", base, change, True)
            twice = text[:-1] + "," + text[1:]
            yield Case(
                "fields", f"{base}: {name}: all twice", base, put(name, twice.encode()), True
            )


def _deletion(metadata: dict[str, Any], name: str) -> str:
    handlers = {k: v for k, v in metadata["item_handlers"].items() if k != name}
    return json.dumps(
        {
            "checkpointable_name": name,
            "original_metadata": metadata,
            "updated_metadata": metadata | {"item_handlers": handlers},
            "operation_id": "0" * 32,
            "destination": None,
        }
    )


def _paths(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs)[:12]:
        yield (*here, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*here, key))


def _edit(name: str, text: str, path: tuple[Any, ...], *value: Any) -> Change:
    def change(step: Path) -> None:
        document = node = json.loads(text)
        for key in path[:-1]:
            node = node[key]
        if value:
            node[path[-1]] = value[0]
        else:
            del node[path[-1]]
        put(name, json.dumps(document).encode())(step)

    return change


PATHS = {
    "up": b"../../../../outside/secret",
    "down and up": b"d/../../../../../outside/secret",
    "absolute": b"/etc/passwd",
    "NUL": b"d/\0",
    "long": b"d/" + b"x" * 60_000,
    "no UTF-8": b"d/\xff",
    "directory": b"d/",
    "nothing": b"",
    "blank": b" ",
    "dots": b"./d/.",
    "half a character": b"d/\xed\xa0\x80",
}


def _tables(place: Path) -> Iterator[Case]:
    """Tables of data files that lead elsewhere."""
    for base in BOTH:
        for title, target in PATHS.items():

            def values(step: Path, target: bytes = target) -> None:
                keys = wire.encode_strings([b"w/c/0/0", b"w/zarr.json"])
                rest = (keys, wire.encode_varints([24, 53]), b"\1\1", b"\0\0", b"\0\0")
                plant(step, with_table([target], *rest), counts=(2, 0, 0))

            def child(step: Path, target: bytes = target) -> None:
                rest = (wire.encode_strings([b""], marked=True), b"\0", b"\0", b"\x64", bytes(3))
                plant(step, with_table([target], *rest, height=1), height=1)

            def root(step: Path, target: bytes = target) -> None:
                plant(step, b"x", file=target.decode(errors="surrogatepass"))

            for what, change in (("value", values), ("node", child), ("root", root)):
                if not (what == "root" and title in ("no UTF-8", "half a character")):
                    yield Case("file tables", f"{base}: {what}: {title}", base, change)
        for what in ("d", EVIL):

            def link(step: Path, what: str = what) -> None:
                values = values_of(step)
                rewrite(step, values)
                outside = step.parents[1] / "moved"
                (step / "params" / what).rename(outside)
                (step / "params" / what).symlink_to(outside)

            yield Case("file tables", f"{base}: a link in place of {what[:4]}", base, link)


def _nodes(place: Path) -> Iterator[Case]:
    """Trees that are none, or without end."""
    frame, magic = wire.encode_frame, ocdbt.NODE_MAGIC
    row = (wire.encode_strings([b"a"]), b"\1", b"\0", b"x")  # one key with one byte
    leaf = with_table([], *row)
    many = [b"%07d" % i for i in range(1 << 20)]

    def of_itself(step: Path) -> None:
        blob = parent([(b"a", 0, 0)], 1)
        for _ in range(3):  # its length has the same number of digits
            blob = parent([(b"a", 0, len(blob))], 1)
        plant(step, blob, height=1)

    def tower(step: Path, wide: int = 1, high: int = 255) -> None:
        blobs = [leaf]
        for height in range(1, high + 1):
            place = sum(map(len, blobs[:-1])), len(blobs[-1])
            blobs.append(parent([(bytes([i]), *place) for i in range(wide)], height))
        plant(step, *blobs, height=high, counts=(wide**high % (1 << 60), 0, 0))

    def again(step: Path) -> None:
        count = 200_000
        rows = wire.encode_strings(many[:count]), bytes(count), bytes(count)
        blobs = [with_table([], *rows)]
        blobs.append(parent([(bytes([i]), 0, len(blobs[0])) for i in range(64)], 1))
        plant(step, *blobs, height=1, counts=(64 * count, 0, 0))

    def plain(*blobs: bytes, **root: Any) -> Change:
        return lambda step: plant(step, *blobs, **root)

    def bomb(size: int) -> Change:
        return lambda step: plant(step, compressed(magic, bytes(size)))

    def rows(step: Path) -> None:
        body = b"\0" + wire.encode_strings([], marked=True) + wire.encode_strings(many)
        plant(step, compressed(magic, body + bytes(2 * len(many))), counts=(len(many), 0, 0))

    def prefixes(step: Path) -> None:  # each key is the one before it and a byte
        count = 4000
        lengths = wire.encode_varints(range(60_000, 60_000 + count - 1))
        sizes = wire.encode_varints([60_000] + [1] * (count - 1))
        body = b"a" * (60_000 + count - 1)
        strings = wire.encode_varints([count]) + lengths + sizes + body
        plant(step, with_table([], strings, bytes(2 * count)), counts=(count, 0, 0))

    def manifest(data: Callable[[], bytes]) -> Change:
        return lambda step: put("params/" + names.MANIFEST, data)(step)

    def numbered(step: Path) -> None:
        whole = (step / "params" / names.MANIFEST).read_bytes()
        body = whole[14:30] + b"\1" + whole[31:-4]
        other = wire.encode_frame(ocdbt.MANIFEST_MAGIC, body)
        for name in (names.MANIFEST, "manifest.0000000000000001", "manifest.ffffffffffffffff"):
            (step / "params" / name).write_bytes(other)
        seal(step)

    def versions(count: int) -> Callable[[], bytes]:
        head = bytes(16) + wire.encode_varints(ocdbt._CONFIG) + wire.encode_files([EVIL])
        columns = wire.encode_varints([count]) + bytes(8 * 1000)
        return lambda: frame(ocdbt.MANIFEST_MAGIC, head, columns)

    forged: dict[str, Change] = {
        "a node that refers to itself": of_itself,
        "a tower of 255 nodes": tower,
        "16 ** 60 paths to a leaf": lambda step: tower(step, 16, 60),
        "2 ** 20 paths to a leaf": lambda step: tower(step, 2, 20),
        "one node of 200,000 rows under 64 parents": again,
        "1 GB of zeros, compressed": bomb(1 << 30),
        "250 MB of zeros, compressed": bomb(250 << 20),
        "a million rows, compressed": rows,
        "keys of 60,000 bytes, each of the one before": prefixes,
        "a manifest of 1 GB, compressed": manifest(
            lambda: compressed(ocdbt.MANIFEST_MAGIC, bytes(1 << 30))
        ),
        "a manifest of 100 MB": manifest(lambda: frame(ocdbt.MANIFEST_MAGIC, bytes(10**8))),
        "2 ** 62 versions": manifest(versions(1 << 62)),
        "no versions": manifest(versions(0)),
        "numbered manifests": numbered,
        "a root before its file": plain(leaf, offset=(1 << 64) - 1),
        "a root at 2 ** 63": plain(leaf, offset=1 << 63),
        "a root at 2 ** 63 - 1": plain(leaf, offset=(1 << 63) - 1),
        "a root beyond the file": plain(leaf, offset=1 << 40),
        "a root of 2 ** 63 bytes": plain(leaf, length=1 << 63),
        "a root of 200 MB": plain(leaf, length=200 << 20),
        "a root of 0 bytes": plain(leaf, length=0),
        "a root in the manifest": plain(leaf, file=names.MANIFEST),
        "a root of another height": plain(leaf, height=3),
        "a height of 255": plain(leaf, height=255),
        "a frame that says 2 ** 64 - 1 bytes": plain(
            wire.with_crc(magic + b"\xff" * 8 + b"\0\0" + bytes(20))
        ),
        "a frame of version 9": plain(
            wire.with_crc(magic + (30).to_bytes(8, "little") + b"\t\0" + bytes(12))
        ),
        "a number of 11 bytes": plain(frame(magic, b"\0", b"\xff" * 10 + b"\1")),
        "a number of 100,000 bytes": plain(frame(magic, b"\0", b"\xff" * 100_000 + b"\1")),
        "a number above 64 bits": plain(frame(magic, b"\0", b"\xff" * 9 + b"\x02")),
        "2 ** 62 files": plain(frame(magic, b"\0", wire.encode_varints([1 << 62]))),
        "2 ** 20 files": plain(frame(magic, b"\0", wire.encode_varints([1 << 20]))),
        "2 ** 62 keys": plain(with_table([], wire.encode_varints([1 << 62]))),
        "a million keys without bytes": plain(with_table([], wire.encode_varints([10**6, 0]))),
        "a value kind 2": plain(with_table([], *row[:2], b"\2", b"x"), counts=(1, 0, 0)),
        "an unknown file": plain(with_table([], *row[:2], b"\1", b"\5", b"\0")),
        "a value of 2 ** 63 bytes within": plain(
            with_table([], row[0], wire.encode_varints([(1 << 63) - 1]), b"\0", b"x")
        ),
        "bytes at the end": plain(leaf[:-4] + b"x"),
        "keys twice": plain(
            with_table([], wire.encode_strings([b"a", b"a"]), bytes(4)), counts=(2, 0, 0)
        ),
        "keys out of order": plain(
            with_table([], wire.encode_strings([b"b", b"a"]), bytes(4)), counts=(2, 0, 0)
        ),
        "no keys": plain(with_table([], wire.encode_strings([]))),
        "more keys than it says": plain(leaf, counts=(0, 0, 0)),
        "fewer keys than it says": plain(leaf, counts=((1 << 63) - 1, 0, 0)),
        "a key that is too long": plain(
            with_table([], wire.encode_strings([b"k" * 70_000]), b"\0\0")
        ),
    }
    for base in BOTH:
        for title, change in forged.items():
            yield Case("nodes", f"{base}: {title}", base, change)


def _values(place: Path) -> Iterator[Case]:
    """Values that are not where they are said to be."""

    def moved(**place: Any) -> Change:
        def change(values: dict[bytes, Any]) -> None:
            for key in chunks(values):
                old = {name: getattr(values[key], name) for name in ("file", "offset", "length")}
                new = {name: f(old[name]) if callable(f) else f for name, f in place.items()}
                values[key] = ValueRef(**{**old, **new})

        return revalue(change)

    def same(values: dict[bytes, Any]) -> None:
        first = values[chunks(values)[0]]
        for key in chunks(values):
            values[key] = ValueRef(first.file, first.offset, values[key].length)

    def overlapping(step: Path) -> None:
        """200,000 chunks of 1 MB that are all the same 1 MB of the file."""
        side, values = 1 << 18, values_of(step)
        (step / "params" / ("d/" + "0" * 32)).write_bytes(bytes(4 * side))
        for i in range(200_000):
            values[f"n/c/{i}".encode()] = ValueRef("d/" + "0" * 32, 0, 4 * side)
        document = json.loads(_bytes(step, values[b"n/zarr.json"]))
        document |= {"shape": [200_000 * side], "data_type": "float32"}
        document["chunk_grid"]["configuration"]["chunk_shape"] = [side]
        document["codecs"] = document["codecs"][:1]
        rewrite(step, values | {b"n/zarr.json": json.dumps(document).encode()})

    forged = {
        "lengths beyond the file": moved(length=lambda n: n + 10**6),
        "lengths of 2 ** 62": moved(length=1 << 62),
        "lengths of 2 ** 63": moved(length=1 << 63),
        "no length": moved(length=0),
        "offsets beyond the file": moved(offset=1 << 40),
        "offsets of 2 ** 63 - 1": moved(offset=(1 << 63) - 1, length=0),
        "offsets of 2 ** 64 - 1": moved(offset=(1 << 64) - 1),
        "the manifest as the data": moved(file=names.MANIFEST),
        "all in one place": revalue(same),
        "200 GB that are the same megabyte": overlapping,
        "no chunks": revalue(lambda values: [values.pop(key) for key in chunks(values)]),
        "no descriptions": revalue(
            lambda values: [values.pop(key) for key in list(values) if key.endswith(b"json")]
        ),
        "descriptions of 2 ** 62 bytes": revalue(
            lambda values: values.update({b"w/zarr.json": ValueRef(EVIL, 0, 1 << 62)})
        ),
        "descriptions of 10 GB": revalue(
            lambda values: values.update({b"w/zarr.json": ValueRef(EVIL, 0, 10**10)})
        ),
        "empty values": revalue(lambda values: values.update(dict.fromkeys(values, b""))),
    }
    for base in DATABASES:
        for title, change in forged.items():
            yield Case("values", f"{base}: {title}", base, change)


def _arrays(place: Path) -> Iterator[Case]:
    """Descriptions that promise too much, and chunks that do."""

    def shape(shape: Any, chunk: Any, dtype: str | None = None) -> Callable[[dict[str, Any]], None]:
        def change(document: dict[str, Any]) -> None:
            document["shape"] = shape
            if "chunk_grid" in document:
                document["chunk_grid"]["configuration"]["chunk_shape"] = chunk
                document["data_type"] = dtype or document["data_type"]
            else:
                document["chunks"] = chunk
                document["dtype"] = dtype or document["dtype"]

        return change

    shapes: dict[str, Callable[[dict[str, Any]], None]] = {
        "10 ** 18 elements in one chunk": shape([HUGE], [HUGE]),
        "10 ** 18 elements in chunks of 1": shape([HUGE], [1]),
        "10 ** 18 elements in chunks of 3": shape([10**9, 10**9], [2, 3]),
        "10 ** 10 elements in one chunk": shape([10**5, 10**5], [10**5, 10**5]),
        "10 ** 10 elements in chunks of 6": shape([10**10, 3], [2, 3]),
        "10 ** 8 elements in chunks of 1": shape([10**8, 1], [1, 1]),
        "a chunk of 10 ** 10 elements of 6": shape([2, 3], [10**5, 10**5]),
        "a chunk of 10 ** 18 elements of 6": shape([2, 3], [10**9, 10**9]),
        "an axis of -1": shape([-1, 3], [2, 3]),
        "an axis of 2 ** 63": shape([1 << 63, 3], [2, 3]),
        "an axis of 2 ** 64": shape([1 << 64, 3], [2, 3]),
        "axes that overflow together": shape([1 << 33] * 8, [1] * 8),
        "an axis of 10 ** 400": shape([10**400, 3], [2, 3]),
        "an axis of 0 and one of 2 ** 62": shape([0, 1 << 62], [1, 1]),
        "an axis of 0 and one of 2 ** 40": shape([0, 1 << 40], [1, 1 << 40]),
        "chunks of 0": shape([2, 3], [0, 3]),
        "chunks of -1": shape([2, 3], [-1, 3]),
        "40 axes": shape([1] * 40, [1] * 40),
        "100,000 axes": shape([1] * 100_000, [1] * 100_000),
        "another rank": shape([2, 3], [6]),
        "fractions": shape([2.0, 3.0], [2, 3]),
        "bools": shape([True, True], [True, True]),
        "no list": shape("23", [2, 3]),
        "a dtype that is none": shape([2, 3], [2, 3], "float3"),
        "an object dtype": shape([2, 3], [2, 3], "|O"),
        "a dtype of 10 ** 9 bytes": shape([2, 3], [2, 3], "|S1000000000"),
        "a dtype of records": shape([2, 3], [2, 3], "<f4,(9,)<f4"),
        "a dtype of a million brackets": shape([2, 3], [2, 3], "<" + "(" * 10**6),
        "codecs 1,000 deep": lambda d: d.update(codecs=json.loads("[" * 400 + "]" * 400)),
        "1,000 codecs": lambda d: d.update(codecs=[{"name": "crc32c"}] * 1000),
        "an unknown codec": lambda d: d.update(codecs=[{"name": "x"}], compressor={"id": "x"}),
        "a fill value 400 deep": lambda d: d.update(fill_value=json.loads("[" * 400 + "]" * 400)),
    }
    for base in BASES:
        for title, change in shapes.items():
            yield Case("arrays", f"{base}: {title}", base, described("w", change), True)

    def data(make_chunk: Callable[[], bytes]) -> Change:
        """The chunk of `w` becomes these bytes, with a CRC-32C if that is its codec."""

        def change(step: Path) -> None:
            chunk = make_chunk()
            for name in ("c/0/0", "0.0"):
                file = step / "params" / "w" / name
                if file.is_file():
                    file.write_bytes(chunk if name == "0.0" else wire.with_crc(chunk))
                    return seal(step)
            values = values_of(step)
            (step / "params" / ("d/" + "0" * 32)).write_bytes(wire.with_crc(chunk))
            values[b"w/c/0/0"] = ValueRef("d/" + "0" * 32, 0, len(chunk) + 4)
            rewrite(step, values)

        return change

    def zeros(nbytes: int, **said: int) -> bytes:
        packer = zstandard.ZstdCompressor(level=3).compressobj(**said)
        parts = [packer.compress(bytes(1 << 20)) for _ in range(nbytes >> 20)]
        return b"".join([*parts, packer.flush()])

    zstd = zstandard.ZstdCompressor(level=3).compress
    bombs = {
        "1 GB of zeros": lambda: zeros(1 << 30, size=1 << 30),
        "1 GB of zeros that do not say so": lambda: zeros(1 << 30),
        "a frame that says 2 ** 62": lambda: (
            b"\x28\xb5\x2f\xfd\xe0" + (1 << 62).to_bytes(8, "little")
        ),
        "two frames": lambda: zstd(bytes(24)) * 2,
        "nothing": lambda: b"",
        "no frame": lambda: b"x" * 24,
    }
    for base in BASES:
        for title, make_chunk in bombs.items():
            yield Case("bombs", f"{base}: {title}", base, data(make_chunk), title == "no frame")


def _special(place: Path) -> Iterator[Case]:
    """Something else in place of each file and directory."""

    def fifo(path: Path) -> None:
        os.mkfifo(path)

    def socket_file(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    def link(target: str) -> Callable[[Path], None]:
        return lambda path: path.symlink_to(target)

    def to_secret(path: Path) -> None:
        path.symlink_to(next(p for p in path.parents if p.name == "work").parent / "outside/secret")

    def to_folder(path: Path) -> None:
        path.symlink_to(next(p for p in path.parents if p.name == "work").parent / "outside/canary")

    kinds: dict[str, Callable[[Path], None]] = {
        "a pipe": fifo,
        "a socket": socket_file,
        "a directory": lambda path: path.mkdir(),
        "/dev/zero": link("/dev/zero"),
        "/dev/stdin": link("/dev/stdin"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to a secret": to_secret,
        "a link to a directory": to_folder,
        "a link to nothing": link("nowhere"),
    }

    def replaced(name: str, make_it: Callable[[Path], None]) -> Change:
        def change(step: Path) -> None:
            path = step / name
            if path.exists():
                path.rename(step.parent.parent / "moved")
            path.parent.mkdir(exist_ok=True, parents=True)
            make_it(path)

        return change

    extra = [
        names.DELETION_RECORD,
        "../metadata/_ROOT_METADATA",
        f"../{names.LOCK}",
        "../superseded",
    ]
    for base in ("ours", "another's", "ours, in files", "another's, in files"):
        step = place / base / "run" / "100"
        there = [str(p.relative_to(step)) for p in sorted(step.rglob("*"))]
        wanted = there if base in BOTH else [n for n in there if n.startswith("params/w")]
        for name in [*wanted, *(extra if base in BOTH else [])]:
            for title, make_it in kinds.items():
                shown = f"{base}: {name[:40]}: {title}"
                yield Case("special files", shown, base, replaced(name, make_it), True)

    def sparse(name: str) -> Change:
        return lambda step: os.truncate(step / name, 1 << 40)

    for base in BOTH:
        for name in (
            "params/_METADATA",
            "config/proto.pbtxt",
            "metrics/metrics",
            "params/manifest.ocdbt",
        ):
            yield Case("special files", f"{base}: {name} of 1 TB", base, sparse(name), True)


def _named(place: Path) -> Iterator[Case]:
    """Names of steps, items, arrays and files."""

    def step_name(name: str) -> Change:
        return lambda step: os.rename(step, step.with_name(name))

    for base in BOTH:
        for title, name in {
            "250 digits": "9" * 250,
            "250 digits with zeros": "0" * 200 + "7" * 50,
            "a prefix and 200 digits": "x_" + "8" * 200,
            "other digits": "١٢٣",
            "a superscript": "²",
            "2 ** 64": str(1 << 64),
        }.items():
            yield Case("names", f"{base}: a step of {title}", base, step_name(name), True)

        def array(name: str) -> Change:
            def change(step: Path) -> None:
                path = step / "params" / "_METADATA"
                document = json.loads(path.read_bytes())
                for entry in document["tree_metadata"].values():
                    if entry["key_metadata"][0]["key"] == "w":
                        entry["key_metadata"][0]["key"] = name
                path.write_text(json.dumps(document).replace("1.5e300", "NaN"))
                seal(step)

            return change

        def item(name: str) -> Change:
            def change(step: Path) -> None:
                path = step / names.CHECKPOINT_METADATA
                document = json.loads(path.read_bytes())
                document["item_handlers"][name] = names.TYPE_PYTREE
                path.write_text(json.dumps(document))
                seal(step)

            return change

        def listed(name: str) -> Change:
            def change(step: Path) -> None:
                path = step / names.INTEGRITY
                if path.is_file():
                    item(name.partition("/")[0])(step)
                    document = json.loads(path.read_bytes().partition(b"\n")[0])
                    document["crc32c"][name] = "00000000"
                    path.write_bytes(with_line(json.dumps(document).encode()))

            return change

        def deleting(name: str) -> Change:
            def change(step: Path) -> None:
                path = step / names.CHECKPOINT_METADATA
                metadata = json.loads(path.read_bytes())
                metadata["item_handlers"] |= {name: "x", "data": "y"}
                path.write_text(json.dumps(metadata))
                (step / names.DELETION_RECORD).write_text(_deletion(metadata, name))
                seal(step)

            return change

        def process(name: str) -> Change:
            def change(step: Path) -> None:
                folder = step / "params" / "array_metadatas"
                (folder / name).write_bytes((folder / "process_0").read_bytes())

            return change

        away = (
            "../../../outside/canary",
            "/etc",
            "..",
            ".",
            "",
            "a\0b",
            "\ud800",
            "a/../../..",
            "x" * 5000,
        )
        kinds: dict[str, tuple[Callable[[str], Change], tuple[str, ...]]] = {
            "an array": (array, away),
            "an item": (item, away),
            "a listed file": (listed, tuple(f"{a}/{b}" for a in ("data", "..", "x") for b in away)),
            "a deletion of": (deleting, (*away, "data", "params", "_CHECKPOINT_METADATA")),
            "a process": (
                process,
                ("process_²", "process_" + "9" * 200, "process_x", "process_-1"),
            ),
        }
        for what, (make_it, choices) in kinds.items():
            for name in choices:
                yield Case("names", f"{base}: {what} {name!r:.40}", base, make_it(name), True)


def _config(place: Path) -> Iterator[Case]:
    """Text protos, and positions of iterators."""
    head = "# proto-message: flax_ckpt.RunConfig\n"
    deep = 'item { key: "a" dict { ' * 100_000
    some = 'item { key: "a" dict { ' * 60 + "}" * 120
    entry = 'item {{ key: "a" {} }}\n'.format
    texts: dict[str, bytes | Callable[[], bytes]] = {
        "100 MB: items": lambda: (head + entry("int: 1") * 4_500_000).encode(),
        "100 MB: a string": lambda: (head + entry(f'str: "{"x" * 10**8}"')).encode(),
        "100 MB: blanks": lambda: head.encode() + b" " * 10**8,
        "100 MB: a name": lambda: b"# proto-message: " + b"x" * 10**8,
        "900 KB: items": (head + entry("int: 1") * 40_000).encode(),
        "100,000 dicts in each other": (head + deep).encode(),
        "60 dicts in each other": (head + some).encode(),
        "300 dicts in each other": (head + some[: len(some) // 2] * 5 + "}" * 2000).encode(),
        "unknown fields": (head + "other { a: 1 } 77: 5").encode(),
        "a key twice": (head + entry("int: 1") + entry('str: "x"')).encode(),
        "no key": (head + "item { int: 1 } item { int: 2 }").encode(),
        "no value": (head + entry("")).encode(),
        **{
            f"the key {key!r}": (head + f'item {{ key: "{key}" int: 1 }}').encode()
            for key in ("__class__", "items", "_fields", "a.b", ".", "__setattr__", "")
        },
        **{
            f"the dtype {name!r:.20}": (head + entry(f'dtype: "{name}"')).encode()
            for name in (
                "O",
                "f8,(9,)f8",
                "(" * 10**5,
                "(99999999999999999999,)f4",
                "V9999999999",
                ">",
                "a\\000",
            )
        },
        "a number of 5,000 digits": (head + entry(f'big_int: "{"9" * 5000}"')).encode(),
        "a number that is none": (head + entry('big_int: "x"')).encode(),
        "provenance of nonsense": (head + "provenance { list { item { } } }").encode(),
        "another message": b"# proto-message: google.protobuf.FileDescriptorProto\nname: 'x'",
        "any message": b"# proto-message: google.protobuf.Any\n[a.b/c] { }",
        "an unknown message": b"# proto-message: os.system\n",
        "no UTF-8": head.encode() + b"\xff\xfe",
        "NUL": bytes(100),
        "nothing": b"",
    }
    array = '{{"$array": [{}, {}, "{}"]}}'.format
    positions: dict[str, bytes] = {
        "an object dtype": array('"O"', "[1]", "AAAAAAAAAAA=").encode(),
        "a dtype of records": array('"f8,f8"', "[]", base64.b64encode(bytes(16)).decode()).encode(),
        "a dtype of lists": array('"(99999999999999999999,)f4"', "[1]", "AAAA").encode(),
        "a dtype of brackets": array(f'"{"(" * 10**5}"', "[1]", "AAAA").encode(),
        "a dtype of 2 ** 31 bytes": array('"V2147483647"', "[0]", "").encode(),
        "no dtype": array('""', "[1]", "AAAA").encode(),
        "a huge shape": array('"<i8"', "[1000000000000000000]", "AAAAAAAAAAA=").encode(),
        "a shape above 64 bits": array('"<i8"', f"[{1 << 70}]", "AAAAAAAAAAA=").encode(),
        "a shape of fractions": array('"<i8"', "[1.0]", "AAAAAAAAAAA=").encode(),
        "a shape of 100 axes": array('"<i8"', str([1] * 100), "AAAAAAAAAAA=").encode(),
        "a shape that is an object": array('"<i8"', "{}", "AAAAAAAAAAA=").encode(),
        "no base64": array('"<i8"', "[1]", "ééé").encode(),
        "bytes of a number": b'{"$bytes": 1}',
        "a tuple of nothing": b'{"$tuple": null}',
        "tuples 400 deep": b'{"$tuple": [' * 400 + b"1" + b"]}" * 400,
    }
    for base in BOTH:
        for name, forged in (
            ("config/proto.pbtxt", texts),
            ("data/process_0-of-1.json", positions),
        ):
            for title, data in forged.items():
                yield Case("configs and positions", f"{base}: {title}", base, put(name, data), True)
