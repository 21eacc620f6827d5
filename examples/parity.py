"""Even or odd: a new head over the network of `digits.py`, which stays as it is.

`finetune_digits.py` and `eval_finetune_digits.py` share this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from digits import Batch, TrainState
from ml_collections import ConfigDict


def load_dataset() -> tuple[Batch, Batch]:
    """Returns the digits' train and test split, with other labels: 0 for even and 1 for odd."""
    train, test = digits.load_dataset()
    return train | {"label": train["label"] % 2}, test | {"label": test["label"] % 2}


class Parity(nn.Module):
    """A linear head over the features of a trained network, whose batch statistics are fixed."""

    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        base = digits.CNN(self.features, self.dtype, num_classes=None, name="base")
        return nn.Dense(2, name="head")(base(x, train=False))


def make_init(config: ConfigDict) -> Callable[[], TrainState]:
    """Returns the function that makes a state, with a base that knows nothing yet."""
    model = Parity(features=tuple(config.features), dtype=jnp.dtype(config.dtype))
    tx = optax.partition(
        {"trained": optax.adam(config.learning_rate), "frozen": optax.set_to_zero()},
        {"head": "trained", "base": "frozen"},
    )

    @jax.jit
    def init() -> TrainState:
        variables = model.init(jax.random.key(config.seed), jnp.ones((1, 8, 8, 1)), train=False)
        return TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    return init
