"""Storage options: dtype on disk, size and axes of chunks, for a tree and for single leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import flax_ckpt as fc
from flax_ckpt.format.arrays import cut_chunks as cut
from flax_ckpt.handlers.saved_tree import SavedTree, read_array_metadatas

# Orbax's reader says that it takes the shardings from the checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

Stored = fc.options.ArrayOptions.Saving.StorageOptions


def context(creator: Any = None, **options: Any) -> fc.Context:
    made = fc.Context()
    for name, value in options.items():
        setattr(made.array.saving.storage_options, name, value)
    made.array.saving.scoped_storage_options_creator = creator
    return made


def save(path: Path, tree: Any, creator: Any = None, **options: Any) -> Path:
    with context(creator, **options):
        fc.save(path, tree)
    return path


def stored(path: Path) -> dict[str, tuple[Any, ...]]:
    """dtype on disk and chunk shape of each array."""
    with SavedTree(str(path / "state")) as saved:
        chunks = {array.name: array.chunk_shape for array in read_array_metadatas(saved.record)[0]}
        return {
            leaf.name: (leaf.dtype.name, chunks.get(leaf.name))
            for leaf in saved.leaves.values()
            if leaf.dtype is not None
        }


# dtype


def test_a_dtype_of_the_tree_leaves_other_kinds_alone(tmp_path: Path) -> None:
    tree = {
        "w": jnp.linspace(0, 1, 7),
        "n": np.linspace(0, 1, 7),
        "count": jnp.int32(70_001),
        "mask": jnp.array([True, False]),
        "number": 0.1,
        "key": jax.random.key(3),
        "text": "x",
    }
    path = save(tmp_path / "ckpt", tree, dtype=jnp.bfloat16)
    found = {name: dtype for name, (dtype, _) in stored(path).items()}
    rest = {"count": "int32", "mask": "bool", "number": "float64", "key": "uint32"}
    assert found == {"w": "bfloat16", "n": "bfloat16", **rest}
    for loaded in (fc.load(path), ocp.load(path)):
        assert (loaded["w"].dtype, loaded["n"].dtype) == (jnp.bfloat16, jnp.bfloat16)
        np.testing.assert_array_equal(loaded["w"], tree["w"].astype(jnp.bfloat16))
        np.testing.assert_array_equal(loaded["n"], tree["n"].astype(jnp.bfloat16))
        assert (int(loaded["count"]), loaded["number"]) == (70_001, 0.1)


def test_loading_casts_back_to_the_dtype_that_is_wanted(tmp_path: Path) -> None:
    values = jnp.linspace(0, 1, 7)
    path = save(tmp_path / "ckpt", {"w": values, "n": np.asarray(values)}, dtype="float16")
    wanted = {"w": jax.ShapeDtypeStruct((7,), np.float32), "n": np.zeros(7, np.float32)}
    for loaded in (fc.load(path, wanted), ocp.load(path, wanted)):
        assert (loaded["w"].dtype, loaded["n"].dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(loaded["w"], values.astype(np.float16).astype(np.float32))


def test_sharded_arrays_are_cast_shard_by_shard(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    array = jax.device_put(jnp.arange(96.0).reshape(8, 12) / 7, sharding)
    path = save(tmp_path / "ckpt", {"w": array}, dtype=np.float16, chunk_byte_size=4)
    for loaded in (fc.load(path)["w"], ocp.load(path)["w"]):
        assert loaded.sharding == sharding
        np.testing.assert_array_equal(loaded, np.asarray(array).astype(np.float16))


def test_values_too_large_for_the_dtype_become_infinite_without_a_warning(tmp_path: Path) -> None:
    """As `astype` of JAX does; NumPy's warns."""
    tree = {"w": jnp.array([1e30]), "i": jnp.array([jnp.nan])}
    path = save(
        tmp_path / "ckpt", tree, lambda k, _: Stored(dtype=[np.int8, np.float16]["w" in str(k)])
    )
    assert np.isinf(fc.load(path)["w"]).all()


@pytest.mark.parametrize("dtype", ["float32", object, "datetime64[s]", "S3"])
def test_a_dtype_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, dtype: Any
) -> None:
    tree = {"a": {"b": jnp.ones(2, jnp.complex64)}}
    with pytest.raises(fc.errors.UnsupportedLeafError, match=r"a/b: complex64\[2\] cannot be"):
        save(tmp_path / "x" / "ckpt", tree, lambda *_: Stored(dtype=dtype))
    assert list(tmp_path.iterdir()) == []


# One leaf.


class Node(NamedTuple):
    a: Any
    b: Any


def test_the_function_gets_key_paths_and_values_as_orbax_gives_them(tmp_path: Path) -> None:
    tree = {"d": [jnp.ones(2), Node(np.ones(1), "s")], "none": None, "e": {}, "n": 3}
    ours: list[Any] = []
    theirs: list[Any] = []
    save(tmp_path / "ours", tree, lambda path, value: ours.append((path, value)))
    orbax = ocp.Context()
    orbax.array.saving.scoped_storage_options_creator = lambda p, v: theirs.append((p, v))
    with orbax:
        ocp.save(tmp_path / "theirs", tree)
    assert [path for path, _ in ours] == [
        (DictKey("d"), SequenceKey(0)),
        (DictKey("d"), SequenceKey(1), GetAttrKey("a")),
        (DictKey("d"), SequenceKey(1), GetAttrKey("b")),
        (DictKey("n"),),
    ]
    assert ours[0][1] is tree["d"][0]
    assert {path for path, _ in theirs} <= {path for path, _ in ours}


def test_what_it_returns_wins_field_by_field(tmp_path: Path) -> None:
    def creator(path: Any, _: Any) -> Any:
        name = path[0].key
        return {"small": Stored(chunk_byte_size=8), "int": Stored(dtype="int8")}.get(name)

    tree = {"small": jnp.ones(8), "int": jnp.ones(8), "rest": jnp.ones(8)}
    path = save(tmp_path / "ckpt", tree, creator, dtype="float16", chunk_byte_size=16)
    assert stored(path) == {
        "small": ("float16", (4,)),
        "int": ("int8", (8,)),
        "rest": ("float16", (8,)),
    }
    for name, array in fc.load(path).items():
        np.testing.assert_array_equal(array, np.ones(8), name)


def test_it_must_return_options_or_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must return StorageOptions or None, got 'int8' for"):
        save(tmp_path / "ckpt", {"a": {"b": np.ones(2)}}, lambda *_: "int8")
    assert list(tmp_path.iterdir()) == []


# Chunks.


def test_axes_are_cut_first(tmp_path: Path) -> None:
    values = np.arange(32 * 48, dtype=np.float32).reshape(32, 48)
    tree = {"w": jnp.asarray(values), "n": values, "scalar": jnp.float32(3)}
    path = save(tmp_path / "ckpt", tree, shard_axes=(1,), chunk_byte_size=1024)
    found = stored(path)
    assert found["w"] == ("float32", (32, 6))
    assert found["scalar"] == ("float32", ())  # has no such axis
    for loaded in (fc.load(path), ocp.load(path)):
        np.testing.assert_array_equal(loaded["w"], values)
        np.testing.assert_array_equal(loaded["n"], values)
    part = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec(None, "x"))
    wanted = {**tree, "w": jax.ShapeDtypeStruct((32, 48), np.float32, sharding=part)}
    np.testing.assert_array_equal(fc.load(path, wanted)["w"], values)


def test_each_axis_is_cut_at_least_once_without_a_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", {"w": jnp.ones((4, 3, 6))}, shard_axes=(0, 2))
    assert stored(path)["w"] == ("float32", (2, 3, 3))
    np.testing.assert_array_equal(ocp.load(path)["w"], np.ones((4, 3, 6)))


@pytest.mark.parametrize("spec", [("x", "y"), ("y", "x"), (None, "x"), ()])
def test_sharded_arrays_are_cut_within_their_shards(tmp_path: Path, spec: Any) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    array = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    path = save(tmp_path / "ckpt", {"w": array}, shard_axes=(1,), chunk_byte_size=40)
    for loaded in (fc.load(path)["w"], ocp.load(path)["w"]):
        np.testing.assert_array_equal(loaded, values)


def test_the_limit_holds_where_a_shard_has_few_divisors(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    array = jax.device_put(
        np.ones((2 * 97, 10), np.float32), NamedSharding(mesh, PartitionSpec("x"))
    )
    path = save(tmp_path / "ckpt", {"w": array}, chunk_byte_size=1000)
    assert math.prod(stored(path)["w"][1]) * 4 <= 1000
    np.testing.assert_array_equal(fc.load(path)["w"], np.ones((194, 10)))


def test_a_negative_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shard_axes must be 0 or more, got \(-1,\)"):
        save(tmp_path / "ckpt", {"w": jnp.ones(4)}, shard_axes=(-1,))


shapes = st.lists(st.integers(0, 60), max_size=4).map(tuple)


@given(shapes, st.sampled_from([1, 2, 8]), st.sets(st.integers(0, 4)), st.integers(1, 500))
def test_any_cut_divides_the_shard_and_keeps_to_the_limit(
    shape: tuple[int, ...], itemsize: int, axes: set[int], limit: int
) -> None:
    chunk = cut(shape, itemsize, axes=tuple(sorted(axes)), limit=limit)
    full = [max(extent, 1) for extent in shape]
    assert all(extent % step == 0 for extent, step in zip(full, chunk, strict=True))
    assert math.prod(chunk) * itemsize <= limit or math.prod(chunk) == 1
    assert all(chunk[axis] < full[axis] for axis in axes if axis < len(full) and full[axis] > 1)
