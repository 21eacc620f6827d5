"""A small NNX module with all that users have in theirs, and its training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 5):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0]
        self.head = nnx.Dict(out=nnx.Linear(width, 2, rngs=rngs))
        self.scale = nnx.data(jnp.full(2, 0.5))
        self.calls = nnx.Variable(jnp.uint32(0))
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = nnx.relu(self.first(x))
        for layer in (*self.layers, self.tied):
            x = self.dropout(self.norm(nnx.relu(layer(x))))
        return self.head.out(x) * self.scale


def model(seed: int = 0, width: int = 5) -> Net:
    return Net(nnx.Rngs(seed), width)


def create(seed: int = 0, tx: optax.GradientTransformation | None = None) -> Any:
    net = model(seed)
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return net, nnx.Optimizer(net, tx, wrt=nnx.Param)


@nnx.jit
def train_step(net: Net, optimizer: nnx.Optimizer, x: jax.Array) -> None:
    grads = nnx.grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)


def batch(step: int) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (4, 3))


def train(state: Any, first: int, last: int) -> Any:
    for step in range(first, last):
        train_step(*state, batch(step))
    return state


def leaves(state: Any) -> dict[str, np.ndarray]:
    """The values of all variables and arrays by path; boxes are no part of it."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state([state])):
        for inner, value in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            if is_key(value):
                value = jax.random.key_data(value)
            keys = [*map(str, path[1:]), jax.tree_util.keystr(inner[1:], simple=True)]
            found["/".join(filter(None, keys))] = np.asarray(value)
    return found


def is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def assert_same(a: Any, b: Any) -> None:
    """Both have one type and graph, and the same bits, dtypes and weak types."""
    assert type(a) is type(b)
    left, right = nnx.state([a]), nnx.state([b])
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        assert getattr(x, "weak_type", None) == getattr(y, "weak_type", None)
    first, second = leaves(a), leaves(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.tobytes() == other.tobytes(), name
