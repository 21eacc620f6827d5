"""Arrays that are handed to JAX many at a time are what `jax.device_put` makes of each."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_ckpt.leaves import array as leaf_array

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int4", "int8", "uint32", "bool", "complex64")


def arrays() -> list[np.ndarray[Any, Any]]:
    shapes = ((), (0,), (3,), (2, 4))
    made = [np.ones(shape, jnp.dtype(name)) for name in DTYPES for shape in shapes]
    return [array * i for i in range(2) for array in made]  # the second of a kind takes another way


def default_device() -> AbstractContextManager[Any]:
    return jax.default_device(jax.devices()[3])


def mesh() -> AbstractContextManager[Any]:
    return jax.set_mesh(jax.make_mesh((4, 2), ("x", "y")))


@pytest.mark.parametrize("around", [contextlib.nullcontext, default_device, mesh])
@pytest.mark.parametrize("private", [True, False])
def test_they_are_what_device_put_makes(
    around: Callable[[], AbstractContextManager[Any]],
    private: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert leaf_array._put is not None  # pyright: ignore[reportPrivateUsage]
    if not private:
        monkeypatch.setattr(leaf_array, "_put", None)
    given = arrays()
    with around():
        made = leaf_array.to_device(given)
        expected = [jax.device_put(array) for array in given]
    for one, other in zip(made, expected, strict=True):
        assert type(one) is type(other)
        assert jax.typeof(one) == jax.typeof(other)
        assert one.sharding == other.sharding
        assert one.committed == other.committed
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_one_that_is_donated_leaves_its_neighbours_alone() -> None:
    memory = np.zeros(4 * 1024 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    parts = [memory[start + 1024 * i : start + 1024 * (i + 1)] for i in range(4)]
    for i, part in enumerate(parts):
        part[:] = i
    made = leaf_array.to_device(parts)
    add = jax.jit(lambda array: array + 10, donate_argnums=0)
    assert jnp.array_equal(add(made[1]), jnp.full(1024, 11.0))
    made[2].delete()
    for i in (0, 3):
        assert jnp.array_equal(made[i], jnp.full(1024, float(i)))
