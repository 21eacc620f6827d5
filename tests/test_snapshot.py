"""After `save_async` returns, the caller may do with the state what a train loop does."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc


class Hold:
    """Keeps a save in its background part until `release` is set."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()


class HoldHandler:
    """Its background part comes before the tree's and blocks it: nothing is written yet."""

    async def save(self, directory: Any, hold: Hold) -> Awaitable[None]:
        return self._wait(directory, hold)

    async def _wait(self, directory: Any, hold: Hold) -> None:
        await directory.await_creation()
        hold.begun.set()
        assert hold.release.wait(60)

    async def load(self, directory: Any, abstract: Any = None) -> Awaitable[Any]:
        raise NotImplementedError

    async def metadata(self, directory: Any) -> None:
        return None

    def is_handleable(self, value: Any) -> bool:
        return isinstance(value, Hold)

    def is_abstract_handleable(self, abstract: Any) -> bool | None:
        return None


def holding() -> fc.Context:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        HoldHandler, checkpointable_name="hold"
    )
    return context


def sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y")), spec)


def make_state() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(64, 32)).astype(np.float32)
    return {
        "plain": jnp.asarray(base),
        "large": jnp.asarray(rng.normal(size=(512, 512)).astype(np.float32)),
        "small": jnp.float32(3.5),
        "int4": jnp.asarray(rng.integers(-8, 8, 33), jnp.int4),
        "sharded": jax.device_put(base, sharding(PartitionSpec("x", "y"))),
        "replicated": jax.device_put(base, sharding(PartitionSpec())),
        "key": jax.random.key(7),
    }


def make_host() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    wide = rng.normal(size=(40, 60))
    return {
        "array": rng.normal(size=1000),
        "rank 0": np.array(5),
        "view": wide[::2, ::3],
        "fortran": np.asfortranarray(wide),
        "big endian": np.arange(9, dtype=">i4"),
    }


def bits(tree: Any) -> Any:
    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        array = array.astype(array.dtype.newbyteorder("="))
        return array.dtype.name, array.shape, array.tobytes()

    return jax.tree.map(leaf, tree)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Begins a save and returns when its background part is running, held."""
    holds: list[Hold] = []

    def start(state: Any, **kwargs: Any) -> tuple[Any, Hold]:
        holds.append(Hold())
        with holding():
            response = fc.save_checkpointables_async(
                tmp_path / "ckpt", {"hold": holds[-1], "state": state}, **kwargs
            )
        assert holds[-1].begun.wait(60)
        assert not (tmp_path / "ckpt").exists()
        return response, holds[-1]

    yield start
    for hold in holds:
        hold.release.set()


def test_donated_to_a_jitted_step_while_the_write_runs(
    tmp_path: Path, begin: Callable[..., Any]
) -> None:
    state, expected = make_state(), bits(make_state())  # `np.asarray` leaves a trace in an array

    @jax.jit
    def advance(array: jax.Array) -> jax.Array:
        return array * 2 + 1

    step = jax.jit(advance, donate_argnums=0)
    numbers = {name: leaf for name, leaf in state.items() if name not in ("key", "int4")}
    response, hold = begin(state)
    for _ in range(3):  # donate the saved buffers, then what came of them
        numbers = {name: step(leaf) for name, leaf in numbers.items()}
    jax.block_until_ready(numbers)
    for leaf in state.values():  # on CPU a step copies what is held elsewhere instead of reusing it
        leaf.delete()
    hold.release.set()
    response.result()
    assert bits(fc.load(tmp_path / "ckpt")) == expected


def test_deleted_while_the_write_runs(tmp_path: Path, begin: Callable[..., Any]) -> None:
    state, expected = make_state(), bits(make_state())  # `np.asarray` leaves a trace in an array
    response, hold = begin(state)
    for leaf in state.values():
        leaf.delete()
    garbage = [jnp.full((512, 512), float(i)) for i in range(8)]  # takes the freed memory
    jax.block_until_ready(garbage)
    hold.release.set()
    response.result()
    assert bits(fc.load(tmp_path / "ckpt")) == expected


def test_numpy_overwritten_in_place_while_the_write_runs(
    tmp_path: Path, begin: Callable[..., Any]
) -> None:
    host, expected = make_host(), bits(make_host())
    response, hold = begin(host)
    for array in host.values():
        array[...] = 77
    hold.release.set()
    response.result()
    assert bits(fc.load(tmp_path / "ckpt")) == expected


def test_the_tree_itself_changed_while_the_write_runs(
    tmp_path: Path, begin: Callable[..., Any]
) -> None:
    state = {"a": jnp.ones(3), "list": [1, 2], "text": "before"}
    metadata = {"note": "before", "list": [1]}
    response, hold = begin(state, custom_metadata=metadata)
    state["a"] = state["b"] = jnp.zeros(3)
    state["list"].append(3)
    state["text"] = "after"
    metadata["note"] = "after"
    metadata["list"].append(2)
    hold.release.set()
    response.result()
    assert bits(fc.load(tmp_path / "ckpt")["a"]) == bits(jnp.ones(3))
    assert fc.load(tmp_path / "ckpt")["list"] == [1, 2]
    assert fc.load(tmp_path / "ckpt")["text"] == "before"
    assert fc.metadata(tmp_path / "ckpt").custom_metadata == {"note": "before", "list": [1]}


def test_metadata_that_json_cannot_hold_is_an_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(fc.errors.FormatError, match="custom_metadata"):
        fc.save_async(tmp_path / "ckpt", {"a": 1}, custom_metadata={"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [[1, 2], "text", 3])
def test_metadata_that_is_no_dict_is_not_silently_dropped(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="custom_metadata"):
        fc.save(tmp_path / "ckpt", {"a": 1}, custom_metadata=wrong)


def test_a_json_checkpointable_changed_while_the_write_runs(tmp_path: Path) -> None:
    hold = Hold()
    context = holding()
    registry = context.checkpointables.registry
    registry.add(fc.handlers.JsonHandler, checkpointable_name="notes")
    notes = {"a": [1, 2]}
    with context:
        response = fc.save_checkpointables_async(tmp_path / "ckpt", {"hold": hold, "notes": notes})
        assert hold.begun.wait(60)
        notes["a"].append(3)
        hold.release.set()
        response.result()
        loaded = fc.load_checkpointables(tmp_path / "ckpt", {"notes": None})
    assert loaded == {"notes": {"a": [1, 2]}}


def test_without_copies_the_caller_keeps_the_arrays_still(tmp_path: Path) -> None:
    """`deepcopy_host_arrays=False` is a promise of the caller's: the bytes are read later."""
    hold = Hold()
    context = holding()
    context.memory.deepcopy_host_arrays = False
    array = np.zeros(4)
    with context:
        response = fc.save_checkpointables_async(
            tmp_path / "ckpt", {"hold": hold, "state": {"a": array}}
        )
    assert hold.begun.wait(60)
    array[...] = 5
    hold.release.set()
    response.result()
    np.testing.assert_array_equal(fc.load(tmp_path / "ckpt")["a"], np.full(4, 5.0))


def test_a_deleted_array_is_refused_by_path(tmp_path: Path) -> None:
    state = {"fine": jnp.ones(3), "params": {"gone": jnp.ones(3)}}
    state["params"]["gone"].delete()
    with pytest.raises(fc.errors.UnsupportedLeafError, match="params/gone: the array was donated"):
        fc.save_async(tmp_path / "ckpt", state)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_state_may_be_donated_and_numpy_leaves_changed(tmp_path: Path) -> None:
    """Loaded arrays adopt memory that was read: it must be theirs alone."""
    fc.save(tmp_path / "ckpt", {"a": jnp.ones(64), "b": jnp.ones(64), "n": np.ones(3)})
    loaded = fc.load(tmp_path / "ckpt")
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    np.testing.assert_array_equal(step(loaded["a"]), np.full(64, 2.0))
    np.testing.assert_array_equal(loaded["b"], np.ones(64))
    loaded["n"][...] = 9
    np.testing.assert_array_equal(fc.load(tmp_path / "ckpt")["n"], np.ones(3))
