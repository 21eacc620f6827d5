"""A small Linen training state with batch statistics, as users have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state


class Net(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: jax.Array


def create(width: int = 5, tx: optax.GradientTransformation | None = None) -> TrainState:
    net = Net(width)
    variables = net.init(jax.random.key(0), jnp.ones((4, 3)))
    return TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        key=jax.random.key(7),
        tx=tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    )


@jax.jit
def train_step(state: TrainState, x: jax.Array) -> TrainState:
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return (y**2).mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(state.params)
    key, _ = jax.random.split(state.key)
    state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
    return state.replace(key=key)


def batch(step: int) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (4, 3))


def train(state: TrainState, first: int, last: int) -> TrainState:
    for step in range(first, last):
        state = train_step(state, batch(step))
    return state


def assert_same(a: Any, b: Any) -> None:
    left, right = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (a, b))
    assert [path for path, _ in left] == [path for path, _ in right]
    for (_, x), (_, y) in zip(left, right, strict=True):
        assert type(x) is type(y) or isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if isinstance(x, jax.Array):
            assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
