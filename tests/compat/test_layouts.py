"""Checkpoints as other writers, other releases and accidents leave them, and hostile ones.

`ORBAX_FORMAT.md` section 8.3 says what a reader must accept, 8.4 which hand-written variants Orbax
itself accepts. Another process writes them with Orbax, or with TensorStore and `json` alone; the
tests edit copies, and load them here.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from tests.compat import trees

MODULE = "tests.compat.test_layouts"
PYTREE = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def tree() -> dict[str, Any]:
    """What the edited checkpoints hold."""
    return {
        "a": {"w": jnp.arange(24, dtype=jnp.float32).reshape(6, 4), "n": 3},
        "big": jnp.asarray(trees.raw(7, "uint16", (40, 50))),  # too big for an index node
        "list": [np.arange(5, dtype=np.int64), jnp.arange(3, dtype=jnp.bfloat16), [1.5]],
        "text": "größer",
        "none": None,
        "empty": {"d": {}, "l": []},
        "key": jax.random.key(7),
    }


def arrays() -> dict[str, np.ndarray]:
    """What the hand-written checkpoints hold."""
    return {
        "w": trees.raw(1, "float32", (6, 4)),
        "bytes": trees.raw(2, "uint8", (7,)),
        "brain": trees.raw(3, "bfloat16", (3, 5)),
        "int4": trees.raw(3, "int4", (4,)),
        "bool": trees.raw(4, "bool", (2, 3)),
        "complex": trees.raw(5, "complex64", (2, 2)),
        "rank0": trees.raw(6, "int32", ()),
        "zeros": np.zeros((4, 4), np.float32),
        "none": np.zeros((0, 3), np.float32),
    }


# --- written by Orbax -----------------------------------------------------------------------


def write_orbax(folder: Path) -> trees.Results:
    import orbax.checkpoint.experimental.v1 as ocp

    def save(name: str, **options: bool) -> list[str]:
        context = ocp.Context()
        for option, value in options.items():
            setattr(context.array.saving, option, value)
        with context:
            ocp.save(folder / name, tree())
        return []

    return {
        "zarr3": trees.attempt(lambda: save("zarr3")),
        "zarr2": trees.attempt(lambda: save("zarr2", use_zarr3=False)),
        "files": trees.attempt(lambda: save("files", use_ocdbt=False)),
    }


# --- written by hand ------------------------------------------------------------------------

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def _zstd(**configuration: Any) -> dict[str, Any]:
    return {"name": "zstd", "configuration": {"level": 3, **configuration}}


def _sharding(inner: list[int], codecs: list[Any], location: str = "end") -> dict[str, Any]:
    configuration = {
        "chunk_shape": inner,
        "codecs": codecs,
        "index_codecs": [_BYTES, _CRC],
        "index_location": location,
    }
    return {"name": "sharding_indexed", "configuration": configuration}


Zarr = Callable[[np.ndarray], dict[str, Any]]


def _zarr3(*codecs: Any, **more: Any) -> Zarr:
    """Metadata of an array with these codecs, in one chunk."""

    def metadata(array: np.ndarray) -> dict[str, Any]:
        chunk = [max(n, 1) for n in array.shape]
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        return {"codecs": list(codecs), "chunk_grid": grid, **more}

    return metadata


def _chunked(chunk: Callable[[int], int]) -> Zarr:
    def metadata(array: np.ndarray) -> dict[str, Any]:
        shape = [chunk(n) for n in array.shape]
        grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
        return {"codecs": [_BYTES, _CRC], "chunk_grid": grid}

    return metadata


def _sharded(inner_is_one: bool, location: str) -> Zarr:
    def metadata(array: np.ndarray) -> dict[str, Any]:
        whole = [max(n, 1) for n in array.shape]
        inner = [1] * array.ndim if inner_is_one else whole
        codecs = [_BYTES, _zstd(), _CRC] if inner_is_one else [_BYTES, _zstd()]
        return _zarr3(_sharding(inner, codecs, location))(array)

    return metadata


def _transposed(array: np.ndarray) -> dict[str, Any]:
    order = list(range(array.ndim))[::-1]
    return _zarr3({"name": "transpose", "configuration": {"order": order}}, _BYTES)(array)


def _zarr2(compressor: Any = None, **more: Any) -> Zarr:
    def metadata(array: np.ndarray) -> dict[str, Any]:
        return {"compressor": compressor, "chunks": [max(n, 1) for n in array.shape], **more}

    return metadata


def _fortran(array: np.ndarray) -> dict[str, Any]:
    return _zarr2(order="F" if array.ndim > 1 else "C")(array)


_BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": 1}
_BLOSC3 = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 1, "blocksize": 0}
_BIG = {"name": "bytes", "configuration": {"endian": "big"}}

ZARR3: dict[str, Zarr] = {
    "bytes": _zarr3(_BYTES),
    "crc": _zarr3(_BYTES, _CRC),
    "zstd": _zarr3(_BYTES, _zstd()),
    "zstd_crc": _zarr3(_BYTES, _zstd(), _CRC),
    "zstd_checksum": _zarr3(_BYTES, _zstd(checksum=True)),
    "gzip": _zarr3(_BYTES, {"name": "gzip", "configuration": {"level": 5}}),
    "blosc": _zarr3(_BYTES, {"name": "blosc", "configuration": _BLOSC3}),
    "transpose": _transposed,
    "big_endian": _zarr3(_BIG, _CRC),
    "sharded": _sharded(inner_is_one=False, location="end"),
    "sharded_ones": _sharded(inner_is_one=True, location="end"),
    "sharded_start": _sharded(inner_is_one=True, location="start"),
    "keys_v2": _zarr3(_BYTES, _CRC, chunk_key_encoding={"name": "v2"}),
    "keys_dot": _zarr3(
        _BYTES,
        _CRC,
        chunk_key_encoding={"name": "default", "configuration": {"separator": "."}},
    ),
    "not_dividing": _chunked(lambda n: max(n - 2, 1)),
    "oversized": _chunked(lambda n: n + 3),
    "ones": _chunked(lambda n: 1),
}
ZARR2: dict[str, Zarr] = {
    "raw": _zarr2(),
    "zstd2": _zarr2({"id": "zstd", "level": 1}),
    "slash": _zarr2(dimension_separator="/"),
    "fortran": _fortran,
    "blosc2": _zarr2({"id": "blosc", **_BLOSC}),
    "zlib": _zarr2({"id": "zlib", "level": 3}),
}
DATABASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "numbered": {"config": {"manifest_kind": "numbered"}},
    "numbered_raw": {"config": {"manifest_kind": "numbered", "compression": None}},
    "nodes_raw": {"config": {"compression": None}},
    "no_inline": {"config": {"max_inline_value_bytes": 0}},
    "small_nodes": {"config": {"max_decoded_node_bytes": 400}},
}


def write_by_hand(folder: Path) -> trees.Results:
    """All variants; nothing but `tensorstore` and `json` is used."""
    work: dict[str, Callable[[Path], None]] = {}
    for name, metadata in ZARR3.items():
        work[name] = lambda path, m=metadata: _by_hand(path, "zarr3", m, {"driver": "ocdbt"})
        work[f"{name}_files"] = lambda path, m=metadata: _by_hand(path, "zarr3", m, None)
    for name, metadata in ZARR2.items():
        work[name] = lambda path, m=metadata: _by_hand(path, "zarr", m, {"driver": "ocdbt"})
        work[f"{name}_files"] = lambda path, m=metadata: _by_hand(path, "zarr", m, None)
    for name, options in DATABASES.items():
        database = {"driver": "ocdbt", **options}
        work[name] = lambda path, d=database: _by_hand(path, "zarr3", ZARR3["crc"], d)
    work["merged"] = _merged
    return {name: trees.attempt(lambda n=name: work[n](folder / n) or []) for name in work}


def _by_hand(path: Path, driver: str, metadata: Zarr, database: dict[str, Any] | None) -> None:
    item = path / "state"
    _describe(path, zarr3=driver == "zarr3", ocdbt=database is not None)
    # One transaction makes one data file; plain files have no such thing.
    together = {"transaction": ts.Transaction(atomic=True), "context": ts.Context()}
    for name, array in arrays().items():
        if database is None:
            kvstore: dict[str, Any] = {"driver": "file", "path": f"{item}/{name}/"}
            _write(array, driver, metadata, kvstore)
        else:
            kvstore = {**database, "base": f"file://{item}/", "path": f"{name}/"}
            _write(array, driver, metadata, kvstore, **together)
    together["transaction"].commit_sync()


def _write(
    array: np.ndarray, driver: str, metadata: Zarr, kvstore: dict[str, Any], **how: Any
) -> None:
    spec = {"driver": driver, "kvstore": kvstore, "metadata": metadata(array)}
    spec["store_data_equal_to_fill_value"] = True
    opened = ts.open(spec, create=True, dtype=array.dtype, shape=array.shape, **how)
    opened.result().write(array).result()


def _describe(path: Path, *, zarr3: bool, ocdbt: bool) -> None:
    (path / "state").mkdir(parents=True)
    (path / "orbax.checkpoint").touch()
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": {"state": PYTREE}}))
    entries = {
        f"leaf {n}": {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for n, name in enumerate(arrays())
    }
    described = {"tree_metadata": entries, "use_ocdbt": ocdbt, "use_zarr3": zarr3}
    (path / "state" / "_METADATA").write_text(json.dumps(described))


def _merged(path: Path) -> None:
    """A database per process, whose keys are copied into the one at the item's root."""
    item = path / "state"
    _describe(path, zarr3=True, ocdbt=True)
    context = ts.Context()

    def kvstore(folder: str) -> Any:
        spec = {"driver": "ocdbt", "base": f"file://{item}/{folder}"}
        return ts.KvStore.open(spec, context=context).result()

    for n, (name, array) in enumerate(arrays().items()):
        base = f"file://{item}/ocdbt.process_{n % 2}/"
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        _write(array, "zarr3", ZARR3["zstd"], store)
    transaction = ts.Transaction(atomic=True)
    target = kvstore("").with_transaction(transaction)
    for n in range(2):
        source = kvstore(f"ocdbt.process_{n}/")
        source.experimental_copy_range_to(target).result()
    transaction.commit_async().result()


ROLES: dict[str, trees.Role] = {"write_orbax": write_orbax, "write_by_hand": write_by_hand}
HAND_WRITTEN = [*ZARR3, *(f"{n}_files" for n in ZARR3), *ZARR2, *(f"{n}_files" for n in ZARR2)]
HAND_WRITTEN += [*DATABASES, "merged"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, trees.Results]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder, trees.run(MODULE, folder, ROLES)


@pytest.fixture
def copy(written: tuple[Path, trees.Results], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint that was written, to edit it."""

    def make(name: str) -> Path:
        folder, results = written
        assert results[name] == []
        return Path(shutil.copytree(folder / name, tmp_path / "ckpt"))

    return make


@pytest.fixture
def ckpt(copy: Callable[[str], Path]) -> Path:
    """A checkpoint of `tree()` as Orbax writes it by default."""
    return copy("zarr3")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file."""
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def check_all(path: Path, expected: Any = None) -> None:
    """Loads a checkpoint in every way; it must hold `tree()`."""
    expected = tree() if expected is None else expected
    assert trees.differences(fc.load(path), trees.plain(expected)) == []
    assert trees.differences(fc.load(path, trees.abstract(expected)), expected) == []
    placed = trees.abstract(expected, trees.first_device)
    assert trees.differences(fc.load(path, placed), expected) == []
    fc.metadata(path)


# --- R1: the root ---------------------------------------------------------------------------


def _handlers(value: Any) -> Callable[[Path], None]:
    return lambda path: edit(
        path / "_CHECKPOINT_METADATA", lambda data: {**data, "item_handlers": value}
    )


def _root(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "_CHECKPOINT_METADATA").write_text(text) and None


def _without(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return remove


def _with_file(name: str) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("anything")

    return add


ROOTS: dict[str, Callable[[Path], None]] = {
    "as it is": lambda path: None,
    "no indicator": _without("orbax.checkpoint"),
    "no commit file": _without("commit_success.txt"),
    "no metadata": _without("_CHECKPOINT_METADATA"),
    "nothing but items": _without("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt"),
    "empty metadata": _root(""),
    "garbage": _root("{]\x00"),
    "no object": _root("[1, 2]"),
    "empty object": _root("{}"),
    "deep": _root("[" * 100_000),
    "odd types": _root('{"item_handlers": 3, "metrics": [], "init_timestamp_nsecs": 1.5}'),
    "unknown key": _root('{"mine": {"a": 1}, "custom_metadata": {"b": 2}}'),
    "handlers string": _handlers(PYTREE),
    "handlers null": _handlers(None),
    "handlers empty": _handlers({}),
    "unknown type": _handlers({"state": "some.other.Handler"}),
    "v0 moved": _handlers({"state": PYTREE.replace("checkpoint.", "checkpoint.v0.", 1)}),
    "stateful type": _handlers(
        {
            "state": "orbax.checkpoint.experimental.v1._src.handlers"
            ".stateful_checkpointable_handler.StatefulCheckpointableHandler"
        }
    ),
    "json type": _handlers(
        {"state": "orbax.checkpoint.experimental.v1._src.handlers.json_handler.JsonHandler"}
    ),
    "more than there is": _handlers({"state": PYTREE, "gone": PYTREE}),
    "descriptor": _with_file("descriptor/descriptor.pbtxt"),
    "file at root": _with_file("notes.txt"),
    "file in item": _with_file("state/notes.txt"),
    "file called checkpoint": _with_file("state/checkpoint"),
    "directory in item": _with_file("state/mine/notes.txt"),
    "unfinished item": _with_file("opt.orbax-checkpoint-tmp/_METADATA"),
}


@pytest.mark.parametrize("name", ROOTS)
def test_r1_roots_that_are_accepted(ckpt: Path, name: str) -> None:
    ROOTS[name](ckpt)
    check_all(ckpt)
    found = fc.load_checkpointables(ckpt, {"state": None})
    assert trees.differences(found, {"state": trees.plain(tree())}) == []


@pytest.mark.parametrize(
    "name", [name for name in ROOTS if name not in ("more than there is", "json type")]
)
def test_r1_roots_that_load_in_bulk(ckpt: Path, name: str) -> None:
    ROOTS[name](ckpt)
    found = fc.load_checkpointables(ckpt)
    assert trees.differences(found, {"state": trees.plain(tree())}) == []
    assert list(fc.checkpointables_metadata(ckpt).metadata) == ["state"]


@pytest.mark.parametrize("item", ["pytree", "default", "model", "größer 雪", "params.v2"])
def test_r1_any_name_of_the_item(ckpt: Path, item: str) -> None:
    (ckpt / "state").rename(ckpt / item)
    check_all(ckpt)
    found = fc.load_checkpointables(ckpt)
    assert trees.differences(found, {item: trees.plain(tree())}) == []


def test_r1_state_wins_over_other_trees(ckpt: Path) -> None:
    shutil.copytree(ckpt / "state", ckpt / "another")
    edit(ckpt / "another" / "_METADATA", _entries(lambda items: items[:1]))
    check_all(ckpt)
    assert list(fc.load_checkpointables(ckpt)) == ["another", "state"]


def test_r1_several_trees_without_state_are_named(ckpt: Path) -> None:
    shutil.copytree(ckpt / "state", ckpt / "params")
    (ckpt / "state").rename(ckpt / "ema")
    with pytest.raises(fc.errors.InvalidLayoutError, match="several PyTrees: ema, params"):
        fc.load(ckpt)


def test_r1_a_flat_checkpoint(ckpt: Path) -> None:
    for path in list((ckpt / "state").iterdir()):
        path.rename(ckpt / path.name)
    (ckpt / "state").rmdir()
    (ckpt / "orbax.checkpoint").unlink()
    _handlers(PYTREE)(ckpt)
    check_all(ckpt)
    (ckpt / "_CHECKPOINT_METADATA").unlink()
    check_all(ckpt)
    assert trees.differences(fc.load(ckpt, checkpointable_name=None), trees.plain(tree())) == []
    with pytest.raises(fc.errors.InvalidLayoutError, match="use flax_ckpt.load"):
        fc.load_checkpointables(ckpt)


def test_r1_the_directory_of_the_tree_itself(ckpt: Path) -> None:
    check_all(ckpt / "state")


def test_r1_a_composite_of_v0(ckpt: Path) -> None:
    (ckpt / "orbax.checkpoint").unlink()
    (ckpt / "state").rename(ckpt / "default")
    (ckpt / "default" / "commit_success.txt").write_text("Checkpoint commit was successful to /x")
    check_all(ckpt)


# --- R2, R3: `_METADATA` --------------------------------------------------------------------


def _entries(change: Callable[[list[tuple[str, Any]]], Any]) -> Callable[[Any], Any]:
    def apply(data: Any) -> Any:
        return {**data, "tree_metadata": dict(change(list(data["tree_metadata"].items())))}

    return apply


def _values(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    def apply(data: Any) -> None:
        for entry in data["tree_metadata"].values():
            change(entry["value_metadata"])

    return apply


def _drop(key: str) -> Callable[[Any], Any]:
    return lambda data: {name: value for name, value in data.items() if name != key}


def _leftover(data: Any) -> None:
    """An entry of an inner node, which a partial save leaves behind."""
    empty = {"value_type": "Dict", "skip_deserialize": True}
    path = [{"key": "a", "key_type": 2}]
    data["tree_metadata"]["('a',)"] = {"key_metadata": path, "value_metadata": empty}


TREES: dict[str, Callable[[Any], Any]] = {
    "identifiers": _entries(lambda items: [(f"x{n}", entry) for n, (_, entry) in enumerate(items)]),
    "backwards": _entries(lambda items: items[::-1]),
    "odd order": _entries(lambda items: items[::2] + items[1::2]),
    "unknown keys": lambda data: {**data, "mine": {"a": [1]}},
    "rich garbage": lambda data: {**data, "value_metadata_tree": "{]"},
    "leftover": _leftover,
    "no use_ocdbt": _drop("use_ocdbt"),
    "null use_ocdbt": lambda data: {**data, "use_ocdbt": None},
    "no fill key": _drop("store_array_data_equal_to_fill_value"),
    "no custom": _drop("custom_metadata"),
    "custom": lambda data: {**data, "custom_metadata": [1, {"a": 2}]},
    "no write_shape": _values(lambda value: value.pop("write_shape", None)),
    "empty not skipped": _values(lambda value: value.update(skip_deserialize=False)),
    "value extras": _values(lambda value: value.update(mine=1)),
}


@pytest.mark.parametrize("change", TREES)
def test_r2_trees_that_are_accepted(ckpt: Path, change: str) -> None:
    edit(ckpt / "state" / "_METADATA", TREES[change])
    check_all(ckpt)


@pytest.mark.parametrize("kind", ["JsonHandler", "ProtoHandler", "MetricsHandler"])
def test_r2_a_tree_is_what_has_its_metadata_whatever_is_recorded(ckpt: Path, kind: str) -> None:
    _handlers({"state": f"orbax.checkpoint.experimental.v1._src.handlers.json_handler.{kind}"})(
        ckpt
    )
    check_all(ckpt)
    found = fc.load_checkpointables(ckpt)
    assert trees.differences(found, {"state": trees.plain(tree())}) == []


def test_r2_what_has_no_metadata_is_no_tree_whatever_is_recorded(ckpt: Path) -> None:
    (ckpt / "notes").mkdir()
    (ckpt / "notes" / "data.json").write_text("[1]")
    _handlers({"state": PYTREE, "notes": PYTREE})(ckpt)
    check_all(ckpt)
    shutil.rmtree(ckpt / "state")
    with pytest.raises(fc.errors.InvalidLayoutError, match="no PyTree"):
        fc.load(ckpt)


def test_r3_ocdbt_is_looked_for_in_plain_files(copy: Callable[[str], Path]) -> None:
    path = copy("files")
    edit(path / "state" / "_METADATA", _drop("use_ocdbt"))
    check_all(path)


def test_r3_zarr2_is_the_default(copy: Callable[[str], Path]) -> None:
    path = copy("zarr2")
    edit(path / "state" / "_METADATA", _drop("use_zarr3"))
    check_all(path)


def test_r3_zarr3_that_is_not_said(ckpt: Path) -> None:
    """Orbax fails too; the error must say which leaf."""
    edit(ckpt / "state" / "_METADATA", _drop("use_zarr3"))
    with pytest.raises(fc.errors.FlaxCkptError, match=r"\b(a[/.]w|a[/.]n|key|list)"):
        fc.load(ckpt)


def test_arrays_of_one_type_under_another(ckpt: Path) -> None:
    """`np.ndarray` where `jax.Array` was: the kind in `_METADATA` decides."""
    edit(
        ckpt / "state" / "_METADATA",
        _values(lambda v: v.update(value_type=v["value_type"].replace("jax.Array", "np.ndarray"))),
    )
    found = fc.load(ckpt)
    assert isinstance(found["a"]["w"], np.ndarray)
    check_all(ckpt, _numpy_only(tree()))


def _numpy_only(value: Any) -> Any:
    value = {**value, "key": jax.random.key_data(value["key"])}
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, value)


# --- R4: the manifest ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, b"", b"garbage"])
def test_r4_only_the_manifest_of_the_item_is_read(ckpt: Path, data: bytes | None) -> None:
    (manifest,) = ckpt.glob("state/ocdbt.process_*/manifest.ocdbt")
    manifest.unlink() if data is None else manifest.write_bytes(data)
    check_all(ckpt)


def test_r4_no_other_manifest_will_do(ckpt: Path) -> None:
    (ckpt / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(fc.errors.DamagedCheckpointError, match="manifest.ocdbt"):
        fc.load(ckpt)


# --- R6: shardings and array metadata -------------------------------------------------------


def _shardings(text: Any) -> Callable[[Path], None]:
    """Gives every array this sharding."""
    return lambda path: edit(
        path / "state" / "_sharding",
        lambda data: dict.fromkeys(data, text if isinstance(text, str) else json.dumps(text)),
    )


def _mesh(ids: Any, shape: list[int], **more: Any) -> dict[str, Any]:
    names = ["x", "y"][: len(shape)]
    found = {"sharding_type": "NamedSharding", "shape": shape, "axis_names": names}
    return found | {"partition_spec": [], "device_mesh": {"mesh": ids}} | more


_ELSEWHERE = _mesh([{"id": 100}, {"id": 101}], [2])
_MINIMAL = {
    "sharding_type": "NamedSharding",
    "shape": [1],
    "axis_names": ["x"],
    "partition_spec": [],
}

SHARDINGS: dict[str, Callable[[Path], None]] = {
    "none": _without("state/_sharding"),
    "empty": lambda path: edit(path / "state" / "_sharding", lambda data: {}),
    "old name": _shardings({"sharding_type": "SingleDeviceSharding", "device_str": "TFRT_CPU_0"}),
    "new name": _shardings({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}),
    "a TPU": _shardings({"sharding_type": "SingleDeviceSharding", "device_str": "TPU_3(x)"}),
    "absent devices": _shardings(_ELSEWHERE),
    "minimal mesh": _shardings(_MINIMAL),
    "a mesh of one": _shardings(_mesh([[{"id": 0}]], [1, 1])),
    "spec beyond the mesh": _shardings(_mesh([{"id": 0}], [1], partition_spec=["z"])),
    "too long a spec": _shardings(_mesh([{"id": 0}], [1], partition_spec=[None] * 9)),
    "not dividing": _shardings(_mesh([{"id": 0}, {"id": 1}], [2], partition_spec=["x"])),
    "positional": _shardings({"sharding_type": "PositionalSharding", "shape": [1]}),
    "no text": _shardings(""),
    "no json": _shardings("{]"),
    "no object": _shardings("[1]"),
    "odd fields": _shardings(_mesh("x", [1], axis_types=["AxisType.Novel"])),
    "no metadata": lambda path: None,
    "other files": _with_file("state/array_metadatas/notes.txt"),
    "odd process": _with_file("state/array_metadatas/process_foo"),
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_r6_shardings_that_are_accepted(ckpt: Path, name: str) -> None:
    SHARDINGS[name](ckpt)
    check_all(ckpt)


@pytest.mark.parametrize(
    "odd",
    [
        {"axis_names": ["x", "x"]},
        {"axis_names": ["x", "x"], "partition_spec": ["x"]},
        {"axis_names": [1, 2]},
        {"axis_names": ["x", "\ud800"]},
        {"device_mesh": {"mesh": [{"id": 0}, {"id": 0}, {"id": 1}, {"id": 2}]}},
    ],
)
def test_r6_meshes_of_which_jax_makes_nothing_are_no_sharding(ckpt: Path, odd: Any) -> None:
    """It ends the process when an array on a mesh with two axes of one name is computed with."""
    _shardings(_mesh([{"id": i} for i in range(4)], [2, 2]))(ckpt)
    assert fc.metadata(ckpt).metadata["big"].sharding is not None
    _shardings(_mesh([{"id": i} for i in range(4)], [2, 2], **odd))(ckpt)
    assert fc.metadata(ckpt).metadata["big"].sharding is None
    check_all(ckpt)


@pytest.mark.parametrize("also", [None, "state/_sharding"])
def test_r6_without_array_metadatas_keys_are_their_data(ckpt: Path, also: str | None) -> None:
    shutil.rmtree(ckpt / "state" / "array_metadatas")
    if also:
        (ckpt / also).unlink()
    check_all(ckpt, {**tree(), "key": jax.random.key_data(tree()["key"])})


def test_r6_array_metadatas_of_another_process_only(ckpt: Path) -> None:
    folder = ckpt / "state" / "array_metadatas"
    (folder / "process_0").rename(folder / "process_12")
    check_all(ckpt)


# --- R5: what is no checkpoint, what is hidden ----------------------------------------------


def test_r5_metrics_are_left_out_in_bulk(ckpt: Path) -> None:
    (ckpt / "metrics").mkdir()
    (ckpt / "metrics" / "metrics").write_text('{"loss": 0.25}')
    assert list(fc.load_checkpointables(ckpt)) == ["state"]
    assert fc.load_checkpointables(ckpt, {"metrics": None}) == {"metrics": {"loss": 0.25}}


@pytest.mark.parametrize("suffix", ["", "-1699999999", ".extra"])
def test_r5_unfinished_directories_are_refused(ckpt: Path, suffix: str) -> None:
    path = ckpt.rename(ckpt.parent / f"7.orbax-checkpoint-tmp{suffix}")
    with pytest.raises(fc.errors.InvalidLayoutError, match="unfinished"):
        fc.load(path)
    with pytest.raises(fc.errors.InvalidLayoutError, match="unfinished"):
        fc.load_checkpointables(path)


def _being_deleted(path: Path, item: str) -> None:
    updated = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    handlers = {**updated["item_handlers"], item: "a.Handler"}
    original = {**updated, "item_handlers": handlers}
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(original))
    record = {"operation_id": "0" * 32, "checkpointable_name": item, "destination": None}
    record |= {"original_metadata": original, "updated_metadata": updated}
    (path / "_CHECKPOINT_DELETION").write_text(json.dumps(record))


def test_r5_an_item_that_is_being_deleted_is_hidden(ckpt: Path) -> None:
    shutil.copytree(ckpt / "state", ckpt / "old")
    _being_deleted(ckpt, "old")
    assert list(fc.load_checkpointables(ckpt)) == ["state"]
    check_all(ckpt)


def test_r5_an_item_that_is_being_deleted_is_not_loaded(ckpt: Path) -> None:
    shutil.copytree(ckpt / "state", ckpt / "old")
    _being_deleted(ckpt, "old")
    with pytest.raises(fc.errors.DeletionInProgressError, match="'old' of .* is being deleted"):
        fc.load(ckpt, checkpointable_name="old")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["7", "12"], "its steps: 7, 12"),
        (["step_12", "step_7"], "its steps: step_7, step_12.*load.*step_12"),
        ([], "is no checkpoint"),
    ],
)
def test_r5_a_root_of_steps_is_no_checkpoint(ckpt: Path, names: list[str], text: str) -> None:
    root = ckpt.parent / "root"
    root.mkdir()
    for name in names:
        shutil.copytree(ckpt, root / name)
    with pytest.raises(fc.errors.InvalidLayoutError, match=text):
        fc.load(root)


# --- R7: other items ------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["data.json", "metadata"])
@pytest.mark.parametrize("version", ["v1 json_handler.JsonHandler", "v0 json_checkpoint_handler.J"])
def test_r7_json_items(ckpt: Path, file: str, version: str) -> None:
    kind, name = version.split()
    prefix = "orbax.checkpoint.experimental.v1" if kind == "v1" else "orbax.checkpoint"
    name = name if kind == "v1" else f"{name}sonCheckpointHandler"
    value = {"a": [1, None, "größer"], "big": 2**80}
    (ckpt / "notes").mkdir()
    (ckpt / "notes" / file).write_text(json.dumps(value))
    _handlers({"state": PYTREE, "notes": f"{prefix}._src.handlers.{name}"})(ckpt)
    assert fc.load_checkpointables(ckpt, {"notes": None}) == {"notes": value}


@pytest.mark.parametrize("known", [True, False])
def test_r7_proto_items(ckpt: Path, known: bool) -> None:
    (ckpt / "config").mkdir()
    (ckpt / "config" / "proto.pbtxt").write_text("seconds: 3\nnanos: 4\n")
    proto = "orbax.checkpoint._src.handlers.proto_checkpoint_handler.ProtoCheckpointHandler"
    _handlers({"state": PYTREE} | ({"config": proto} if known else {}))(ckpt)
    found = fc.load_checkpointables(ckpt, {"config": Duration})
    assert found == {"config": Duration(seconds=3, nanos=4)}


# --- R8: what Orbax lets pass silently ------------------------------------------------------


def test_r8_wide_arrays_are_not_narrowed(ckpt: Path) -> None:
    edit(
        ckpt / "state" / "_METADATA",
        _values(lambda v: v.update(value_type=v["value_type"].replace("np.ndarray", "jax.Array"))),
    )
    with pytest.raises(fc.errors.TreeMismatchError, match=r"list/0: saved int64\[5\].*x64"):
        fc.load(ckpt)


def test_r8_numpy_shapes_are_compared(ckpt: Path) -> None:
    wanted = trees.abstract(tree())
    wanted["list"][0] = np.zeros(4, np.int64)
    with pytest.raises(fc.errors.TreeMismatchError, match="list/0"):
        fc.load(ckpt, wanted)


# --- 8.4: hand-written ----------------------------------------------------------------------


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_r3_hand_written_variants(copy: Callable[[str], Path], name: str) -> None:
    path, expected = copy(name), arrays()
    assert trees.differences(fc.load(path), expected) == []
    jax_arrays = {key: jnp.asarray(value) for key, value in expected.items()}
    found = fc.load(path, trees.abstract(jax_arrays, trees.first_device))
    assert trees.differences(found, jax_arrays) == []
    found = fc.load(path, trees.abstract(jax_arrays, trees.other_mesh))
    assert trees.differences(found, jax_arrays) == []


@pytest.mark.parametrize("name", ["crc", "zstd", "raw", "crc_files", "merged"])
def test_r3_hand_written_jax_arrays_without_a_sharding(
    copy: Callable[[str], Path], name: str
) -> None:
    path = copy(name)
    edit(path / "state" / "_METADATA", _values(lambda v: v.update(value_type="jax.Array")))
    expected = {key: jnp.asarray(value) for key, value in arrays().items()}
    assert trees.differences(fc.load(path), expected) == []
    assert trees.differences(fc.load(path, trees.abstract(expected)), expected) == []


@pytest.mark.parametrize("name", ["crc", "crc_files", "sharded_ones", "zstd_crc"])
def test_a_missing_chunk_is_an_error(copy: Callable[[str], Path], name: str) -> None:
    path = copy(name)
    item = path / "state"
    driver = "file" if name.endswith("files") else "ocdbt"
    if driver == "file":
        shutil.rmtree(item / "zeros" / "c")
    else:
        spec = {"driver": "ocdbt", "base": f"file://{item}/", "path": "zeros/c/"}
        ts.KvStore.open(spec).result().delete_range(ts.KvStore.KeyRange()).result()
    with pytest.raises(fc.errors.DamagedCheckpointError, match="zeros"):
        fc.load(path)


# --- malformed ------------------------------------------------------------------------------


def _entry(path: list[tuple[Any, Any]], **value: Any) -> dict[str, Any]:
    keys = [{"key": key, "key_type": kind} for key, kind in path]
    return {"key_metadata": keys, "value_metadata": value}


def _add(*entries: dict[str, Any]) -> Callable[[Any], Any]:
    def apply(data: Any) -> None:
        data["tree_metadata"] |= {f"new {n}": entry for n, entry in enumerate(entries)}

    return apply


_NONE: dict[str, Any] = {"value_type": "None", "skip_deserialize": True}
_ARRAY: dict[str, Any] = {"value_type": "np.ndarray", "skip_deserialize": False}

MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown kind": (_add(_entry([("new", 2)], **{**_ARRAY, "value_type": "torch"})), "torch|new"),
    "list gap": (_add(_entry([("list", 2), ("9", 1)], **_NONE)), "list"),
    "list index no number": (_add(_entry([("list", 2), ("x", 1)], **_NONE)), "list"),
    "negative index": (_add(_entry([("list", 2), ("-1", 1)], **_NONE)), "list"),
    "leading zero": (_add(_entry([("list", 2), ("03", 1)], **_NONE)), "list"),
    "two kinds of node": (_add(_entry([("a", 2), ("0", 1)], **_NONE)), "a/0|another kind"),
    "twice": (_add(_entry([("none", 2)], **_NONE)), "none"),
    "key type": (_add(_entry([("new", 3)], **_NONE)), "enum value 3 .*key_type"),
    "key type no integer": (
        _add(_entry([("list", 2), ("3", 2.5)], **_NONE)),
        "got `float` .*key_type",
    ),
    "key no string": (_add(_entry([(1, 2)], **_NONE)), "got `int` .*key`"),
    "no value type": (_add(_entry([("new", 2)], skip_deserialize=True)), "value_type"),
    "value type no string": (_add(_entry([("new", 2)], value_type=3)), "value_type"),
    "no keys": (_add({"value_metadata": _NONE}), "key_metadata"),
    "no value": (_add({"key_metadata": []}), "value_metadata"),
    "entry no object": (_add("x"), "malformed"),  # type: ignore[arg-type]
    "too deep": (_add(_entry([("a", 2)] * 5000, **_NONE)), "5000|deep"),
    "empty": (lambda data: {**data, "tree_metadata": {}}, "tree_metadata"),
    "missing": (_drop("tree_metadata"), "tree_metadata"),
    "a list": (lambda data: [data], "_METADATA"),
    "array not there": (_add(_entry([("new", 2)], **_ARRAY)), "new"),
    "string not there": (
        _add(_entry([("new", 2)], value_type="string", skip_deserialize=False)),
        "new",
    ),
    "scalar of rank 1": (
        lambda data: _by_path(data, "list", "0")["value_metadata"].update(value_type="scalar"),
        "list/0",
    ),
}


def _by_path(data: Any, *keys: str) -> dict[str, Any]:
    return next(
        entry
        for entry in data["tree_metadata"].values()
        if [key["key"] for key in entry["key_metadata"]] == list(keys)
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_trees_are_typed_errors(ckpt: Path, name: str) -> None:
    change, text = MALFORMED[name]
    edit(ckpt / "state" / "_METADATA", change)
    with pytest.raises(fc.errors.FlaxCkptError, match=text):
        fc.load(ckpt)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        *itertools.product(
            ["_METADATA", "_sharding", "_strings.json", "array_metadatas/process_0"],
            [b"", b"{]", b"[" * 100_000, b"\xff\xfe", b"3", b'{"tree_metadata": 3}'],
        ),
    ],
)
def test_garbage_is_a_typed_error(ckpt: Path, file: str, data: bytes) -> None:
    (ckpt / "state" / file).write_bytes(data)
    with pytest.raises(fc.errors.FlaxCkptError, match=re.escape(file)):
        fc.load(ckpt)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("_METADATA", "no PyTree|no checkpoint|_METADATA"),
        ("manifest.ocdbt", "manifest.ocdbt"),
        ("_strings.json", "_strings.json"),
        ("d", "/d/"),
        ("ocdbt.process_0", "big|ocdbt.process_0"),
    ],
)
def test_missing_files_are_named(ckpt: Path, file: str, text: str) -> None:
    path = ckpt / "state" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(fc.errors.FlaxCkptError, match=text):
        fc.load(ckpt)


# --- hostile --------------------------------------------------------------------------------


def _redirect(item: Path, target: bytes) -> None:
    """Puts another path in the place of the data files' in all index files."""
    for path in [*item.glob("manifest.*"), *(item / "d").iterdir()]:
        path.write_bytes(_patch_frames(path.read_bytes(), target))


def _patch_frames(data: bytes, target: bytes) -> bytes:
    found = bytearray(data)
    for magic in (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"):
        start = data.find(magic)
        while start >= 0:
            length = int.from_bytes(data[start + 4 : start + 12], "little")
            body = bytes(found[start : start + length - 4])
            body = re.sub(rb"d/[0-9a-f]{32}", lambda m: target.ljust(len(m[0]), b"x"), body)
            crc = crc32c.crc32c(body).to_bytes(4, "little")
            found[start : start + length] = body + crc
            start = data.find(magic, start + length)
    return bytes(found)


def test_the_redirection_is_sound(copy: Callable[[str], Path]) -> None:
    """What the next test does to the index is found out only by looking at the path."""
    path = copy("nodes_raw")
    _redirect(path / "state", b"")  # all data files become one, inside, that is not there
    with pytest.raises(fc.errors.DamagedCheckpointError, match=r"/xx\w{32}: .*missing"):
        fc.load(path)


@pytest.mark.parametrize("target", [b"../", b"d/../../", b"/tmp/", b"\0", b"d/../", b"./../"])
def test_data_files_outside_are_refused(copy: Callable[[str], Path], target: bytes) -> None:
    path = copy("nodes_raw")
    _redirect(path / "state", target)
    with pytest.raises(fc.errors.FormatError, match="path"):
        fc.load(path)


def test_data_files_outside_are_refused_whatever_the_manifest(copy: Callable[[str], Path]) -> None:
    path = copy("numbered_raw")
    _redirect(path / "state", b"../")
    with pytest.raises(fc.errors.FormatError, match="inside the directory|Invalid key"):
        fc.load(path)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", ".."])
def test_array_names_that_lead_out_are_refused(copy: Callable[[str], Path], name: str) -> None:
    path = copy("crc_files")
    shutil.copytree(path / "state" / "w", path / "outside")
    edit(
        path / "state" / "_METADATA",
        lambda data: _by_path(data, "w").update(_entry([(name, 2)], **_ARRAY)),
    )
    with pytest.raises(fc.errors.FormatError, match="inside the directory"):
        fc.load(path)


@pytest.mark.parametrize("name", ["crc", "zstd", "no_inline", "merged"])
def test_symbolic_links_to_data_are_refused(copy: Callable[[str], Path], name: str) -> None:
    path = copy(name)
    item = path / "state"
    folders = [f for f in (item / "d", item / "ocdbt.process_0" / "d") if f.exists()]
    for file in (file for folder in folders for file in list(folder.iterdir())):
        moved = file.rename(path.parent / file.name)
        file.symlink_to(moved)
    with pytest.raises(fc.errors.FlaxCkptError, match="is a link"):
        fc.load(path)


def test_symbolic_links_to_what_tensorstore_reads_are_refused(ckpt: Path) -> None:
    """The index is whole; the compressed values it refers to lie elsewhere."""
    folder = ckpt / "state" / "ocdbt.process_0" / "d"
    for file in list(folder.iterdir()):
        file.symlink_to(shutil.move(file, ckpt.parent / file.name))
    with pytest.raises(fc.errors.FlaxCkptError, match="is a link"):
        fc.load(ckpt)


@pytest.mark.parametrize("name", ["crc", "zstd"])
def test_a_symbolic_link_to_the_data_directory_is_refused(
    copy: Callable[[str], Path], name: str
) -> None:
    path = copy(name)
    moved = (path / "state" / "d").rename(path.parent / "elsewhere")
    (path / "state" / "d").symlink_to(moved)
    with pytest.raises(fc.errors.FlaxCkptError, match="is a link"):
        fc.load(path)


def test_a_symbolic_link_to_a_checkpoint_is_followed(ckpt: Path) -> None:
    (ckpt.parent / "latest").symlink_to(ckpt)
    check_all(ckpt.parent / "latest")


def test_symbolic_links_to_chunks_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("crc_files")
    chunk = path / "state" / "w" / "c" / "0" / "0"
    moved = chunk.rename(path.parent / "chunk")
    chunk.symlink_to(moved)
    with pytest.raises(fc.errors.FlaxCkptError, match="is a link"):
        fc.load(path)


def test_a_file_names_no_code(ckpt: Path) -> None:
    """A type string selects among registered handlers: nothing is imported."""
    (ckpt / "odd").mkdir()
    _handlers({"state": PYTREE, "odd": "antigravity.Handler"})(ckpt)
    with pytest.raises(fc.errors.NoEntryError, match="odd.*antigravity"):
        fc.load_checkpointables(ckpt)
    assert "antigravity" not in sys.modules


def test_names_in_sharding_need_not_be_text(ckpt: Path) -> None:
    key = base64.urlsafe_b64encode(b"\xff\xfe").decode()
    edit(ckpt / "state" / "_sharding", lambda data: {**data, key: "{}"})
    with pytest.raises(fc.errors.FormatError, match="_sharding"):
        fc.load(ckpt)


if __name__ == "__main__":
    trees.main(ROLES)
