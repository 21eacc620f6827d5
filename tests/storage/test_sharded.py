"""Sharded arrays on eight devices: saved from any sharding, restored into any other."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import flax_ckpt as fc

DEVICES = np.array(jax.devices())


def mesh(*shape: int, names: str = "xyz", **kwargs: Any) -> Mesh:
    devices = DEVICES[: math.prod(shape)].reshape(shape)
    return Mesh(devices, tuple(names[: len(shape)]), **kwargs)


def values(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


def place(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.device_put(values(shape), sharding)


def abstract(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def assert_is(array: Any, expected: np.ndarray[Any, Any], sharding: Any) -> None:
    assert isinstance(array, jax.Array)
    assert array.sharding.is_equivalent_to(sharding, array.ndim), array.sharding
    np.testing.assert_array_equal(np.asarray(array), expected)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


SPECS = {
    "split over both axes": P("x", "y"),
    "split the other way": P("y", "x"),
    "one axis, replicated over the other": P("x"),
    "the second axis": P(None, "y"),
    "one dimension over both mesh axes": P(("x", "y")),
    "the reverse of it": P(None, ("y", "x")),
    "replicated": P(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "ckpt"
    grid = mesh(4, 2)
    fc.save(path, {name: place((8, 16), NamedSharding(grid, spec)) for name, spec in SPECS.items()})
    return path


@pytest.mark.parametrize("name", SPECS)
def test_it_comes_back_with_the_saved_sharding(saved: Path, name: str) -> None:
    sharding = NamedSharding(mesh(4, 2), SPECS[name])
    loaded = fc.load(saved)[name]
    assert_is(loaded, values((8, 16)), sharding)
    assert loaded.sharding == sharding


def test_an_abstract_leaf_without_a_sharding_means_the_saved_one(saved: Path) -> None:
    wanted = {name: jax.ShapeDtypeStruct((8, 16), np.float32) for name in SPECS}
    for name, array in fc.load(saved, wanted).items():
        assert_is(array, values((8, 16)), NamedSharding(mesh(4, 2), SPECS[name]))


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1), (2, 2), (1, 1)])
def test_into_another_mesh_and_spec(saved: Path, shape: tuple[int, int], spec: P) -> None:
    sharding = NamedSharding(mesh(*shape), spec)
    wanted = {name: jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding) for name in SPECS}
    for array in fc.load(saved, wanted).values():
        assert_is(array, values((8, 16)), sharding)


def test_into_a_permuted_mesh(saved: Path) -> None:
    devices = DEVICES[[7, 2, 5, 0, 1, 6, 3, 4]].reshape(2, 4)
    sharding = NamedSharding(Mesh(devices, ("x", "y")), P("y", "x"))
    wanted = {name: jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding) for name in SPECS}
    for array in fc.load(saved, wanted).values():
        assert_is(array, values((8, 16)), sharding)


@pytest.mark.parametrize("number", [0, 5])
def test_into_one_device(saved: Path, number: int) -> None:
    sharding = SingleDeviceSharding(DEVICES[number])
    wanted = {name: jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding) for name in SPECS}
    for array in fc.load(saved, wanted).values():
        assert_is(array, values((8, 16)), sharding)


def test_into_numpy(saved: Path) -> None:
    wanted = {name: np.zeros((8, 16), np.float32) for name in SPECS}
    for array in fc.load(saved, wanted).values():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, values((8, 16)))


def test_a_concrete_array_gives_its_sharding(saved: Path) -> None:
    sharding = NamedSharding(mesh(2, 4), P("y"))
    wanted = {name: place((8, 16), sharding) for name in SPECS}
    for array in fc.load(saved, wanted).values():
        assert_is(array, values((8, 16)), sharding)


def test_from_one_device_into_many(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"w": jax.device_put(values((8, 6)), DEVICES[3])})
    assert_is(fc.load(tmp_path / "ckpt")["w"], values((8, 6)), SingleDeviceSharding(DEVICES[3]))
    sharding = NamedSharding(mesh(4, 2), P("x", "y"))
    wanted = {"w": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharding)}
    assert_is(fc.load(tmp_path / "ckpt", wanted)["w"], values((8, 6)), sharding)


def test_an_explicit_mesh_comes_back_explicit(tmp_path: Path) -> None:
    grid = mesh(4, 2, axis_types=(AxisType.Explicit, AxisType.Auto))
    sharding = NamedSharding(grid, P("x", "y"))
    fc.save(tmp_path / "ckpt", {"w": place((8, 6), sharding)})
    loaded = fc.load(tmp_path / "ckpt")["w"]
    assert loaded.sharding == sharding
    assert loaded.sharding.mesh.axis_types == (AxisType.Explicit, AxisType.Auto)


def test_metadata_has_the_sharding(saved: Path) -> None:
    described = fc.metadata(saved).metadata
    for name, spec in SPECS.items():
        assert described[name].sharding == NamedSharding(mesh(4, 2), spec)
    assert_is(
        fc.load(saved, described)["split over both axes"],
        values((8, 16)),
        NamedSharding(mesh(4, 2), P("x", "y")),
    )


def test_a_weakly_typed_and_a_cast_sharded_array(tmp_path: Path) -> None:
    sharding = NamedSharding(mesh(4, 2), P("x", "y"))
    fc.save(tmp_path / "ckpt", {"w": place((8, 6), sharding)})
    wanted = {"w": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding, weak_type=True)}
    loaded = fc.load(tmp_path / "ckpt", wanted)["w"]
    assert (loaded.dtype, loaded.weak_type) == (jnp.bfloat16, True)
    assert_is(loaded, values((8, 6), jnp.bfloat16), sharding)


def test_zero_size_and_rank_0_sharded_arrays(tmp_path: Path) -> None:
    grid = mesh(4, 2)
    tree = {
        "none": place((0, 4), NamedSharding(grid, P(None, "y"))),
        "rank 0": place((), NamedSharding(grid, P())),
        "one": place((1,), NamedSharding(grid, P())),
    }
    fc.save(tmp_path / "ckpt", tree)
    for name, array in fc.load(tmp_path / "ckpt").items():
        assert_is(array, np.asarray(tree[name]), tree[name].sharding)


# Arrays larger than a chunk.


def small_chunks(nbytes: int) -> fc.Context:
    context = fc.Context()
    context.array.saving.storage_options.chunk_byte_size = nbytes
    return context


def chunk_files(path: Path) -> int:
    """How many chunks a tree of one array `w` was stored in."""
    from flax_ckpt.storage.database import Database
    from flax_ckpt.storage.record import Record

    with Database(Record(str(path / "state")), checked=False) as database:
        return sum(key.startswith(b"w/c") for key in database.values)


@pytest.mark.parametrize("shape", [(97,), (7, 11), (3, 5, 7), (16, 6), (1, 1, 50), (64, 1, 2)])
@pytest.mark.parametrize("nbytes", [1, 24, 100, 1 << 20])
def test_odd_shapes_in_small_chunks(tmp_path: Path, shape: tuple[int, ...], nbytes: int) -> None:
    with small_chunks(nbytes):
        fc.save(tmp_path / "ckpt", {"w": jnp.asarray(values(shape)), "n": values(shape, np.int16)})
    assert (chunk_files(tmp_path / "ckpt") == 1) is (math.prod(shape) * 4 <= nbytes)
    loaded = fc.load(tmp_path / "ckpt")
    np.testing.assert_array_equal(np.asarray(loaded["w"]), values(shape))
    np.testing.assert_array_equal(loaded["n"], values(shape, np.int16))


@pytest.mark.parametrize("spec", [P("x", "y"), P("y", "x"), P(None, ("x", "y")), P("x"), P()])
@pytest.mark.parametrize("nbytes", [8, 60, 256])
def test_sharded_arrays_in_small_chunks(tmp_path: Path, spec: P, nbytes: int) -> None:
    saved_as = NamedSharding(mesh(4, 2), spec)
    with small_chunks(nbytes):
        fc.save(tmp_path / "ckpt", {"w": place((24, 40), saved_as)})
    assert chunk_files(tmp_path / "ckpt") > 8
    for wanted in (P("x", "y"), P(None, "x"), P("y"), P()):  # contiguous in a region, and not
        sharding = NamedSharding(mesh(2, 4), wanted)
        loaded = fc.load(tmp_path / "ckpt", {"w": abstract(values((24, 40)), sharding)})
        assert_is(loaded["w"], values((24, 40)), sharding)


# Any shape, mesh and spec.

MESHES = [(8,), (4,), (4, 2), (2, 4), (2, 2), (2, 2, 2), (1, 8), (3,), (3, 2)]


@st.composite
def shardings(draw: st.DrawFn, shape: tuple[int, ...]) -> NamedSharding:
    """A sharding whose mesh axes divide the dimensions that they split."""
    grid = mesh(*draw(st.sampled_from(MESHES)))
    free = draw(st.permutations(grid.axis_names))
    parts: list[Any] = []
    for size in shape:
        taken: list[str] = []
        while free and draw(st.booleans()):
            ways = math.prod(grid.shape[axis] for axis in [*taken, free[-1]])
            if size % ways:
                break
            taken.append(free.pop())
        parts.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return NamedSharding(grid, P(*parts))


@st.composite
def moves(draw: st.DrawFn) -> tuple[tuple[int, ...], NamedSharding, NamedSharding, int]:
    sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24])
    shape = tuple(draw(st.lists(sizes, min_size=0, max_size=3)))
    return shape, draw(shardings(shape)), draw(shardings(shape)), draw(st.integers(1, 400))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves())
def test_any_sharding_restores_into_any_other(
    move: tuple[tuple[int, ...], NamedSharding, NamedSharding, int],
) -> None:
    shape, source, target, nbytes = move
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ckpt")
        with small_chunks(nbytes):
            fc.save(path, {"w": place(shape, source)})
        assert_is(fc.load(path)["w"], values(shape), source)
        assert_is(fc.load(path, {"w": abstract(values(shape), target)})["w"], values(shape), target)


# Where the devices of the saved sharding do not exist.

ONE_DEVICE = """
    import logging, sys, warnings
    warnings.simplefilter("error")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s|%(name)s|%(message)s")
    import jax, numpy as np, flax_ckpt as fc
    assert jax.device_count() == 1
    for _, array in fc.load(sys.argv[1]).items():
        np.testing.assert_array_equal(array, np.arange(128.).reshape(8, 16))
        assert isinstance(array, jax.Array) and array.devices() == set(jax.devices())
    wanted = jax.ShapeDtypeStruct((8, 16), np.float32)
    fc.load(sys.argv[1], {name: wanted for name in fc.metadata(sys.argv[1]).metadata})
    shardings = [leaf.sharding for leaf in fc.metadata(sys.argv[1]).metadata.values()]
    assert shardings == [None] * len(shardings), shardings
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=device)
    fc.load(sys.argv[1], {name: placed for name in fc.metadata(sys.argv[1]).metadata})
"""


def test_without_the_saved_devices_one_info_line_and_no_warning(
    saved: Path, run_child: Any
) -> None:
    done = run_child(ONE_DEVICE, saved, devices=1)
    ours = [line for line in done.stderr.splitlines() if "|flax_ckpt" in line]
    expected = (
        f"INFO|flax_ckpt|{saved}/state: the devices that {len(SPECS)} arrays were saved on are not"
        " here; they were loaded to one device. Give shardings to place them"
    )
    # One for each of the two loads that gave no sharding; none for the one that did.
    assert ours == [expected, expected]
    assert "Warning" not in done.stderr


def test_with_the_saved_devices_nothing_is_logged(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flax_ckpt"):
        fc.load(saved)
    assert caplog.messages == []


def test_a_target_mesh_without_devices_is_refused_by_name(saved: Path) -> None:
    """A sharding on an abstract mesh needs `jax.set_mesh` around the load."""
    described = jax.sharding.AbstractMesh((4, 2), ("x", "y"))
    wanted = {
        name: jax.ShapeDtypeStruct((8, 16), np.float32, sharding=NamedSharding(described, P("x")))
        for name in SPECS
    }
    with jax.set_mesh(mesh(4, 2)):
        loaded = fc.load(saved, wanted)
    assert_is(loaded["replicated"], values((8, 16)), NamedSharding(mesh(4, 2), P("x")))
    with pytest.raises((ValueError, fc.errors.FlaxCkptError), match="mesh"):
        fc.load(saved, wanted)


def test_the_type_of_an_array_is_an_abstract_leaf(tmp_path: Path) -> None:
    """`jax.typeof` of an array that is not sharded has a sharding on an empty abstract mesh."""
    state = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.zeros((), jnp.int32)}
    fc.save(tmp_path / "ckpt", state)
    loaded = fc.load(tmp_path / "ckpt", jax.tree.map(jax.typeof, state))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, state))


def test_a_sharding_that_does_not_divide_the_shape_names_the_leaf(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"fine": jnp.zeros((8, 3)), "odd": jnp.zeros((7, 3))})
    sharding = NamedSharding(mesh(4, 2), P("x"))
    wanted = {
        "fine": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding),
        "odd": jax.ShapeDtypeStruct((7, 3), np.float32, sharding=sharding),
    }
    with pytest.raises(ValueError, match="odd"):
        fc.load(tmp_path / "ckpt", wanted)
