"""Handwritten digits: the network in NNX and its optimizer; the data are those of `digits.py`.

`train_digits_nnx.py` and `eval_digits_nnx.py` share this file.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from digits import Batch
from flax import nnx
from ml_collections import ConfigDict


class CNN(nnx.Module):
    """Convolutions, each with batch normalization and pooling, dropout and a linear classifier."""

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.convs, self.norms = nnx.List(), nnx.List()
        before = 1
        for features in config.features:
            conv = nnx.Conv(before, features, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
            self.convs.append(conv)
            self.norms.append(nnx.BatchNorm(features, momentum=0.9, dtype=dtype, rngs=rngs))
            before = features
        side = 8 // 2 ** len(config.features)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.classifier = nnx.Linear(before * side * side, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), strides=(2, 2))
        x = self.dropout(x.reshape((x.shape[0], -1)))
        return self.classifier(x)


def make_model(config: ConfigDict) -> Callable[[], CNN]:
    """Returns the function that makes the model at step 0."""
    return lambda: CNN(config, rngs=nnx.Rngs(config.seed))


def make_init(config: ConfigDict) -> Callable[[], tuple[CNN, nnx.Optimizer]]:
    """Returns the function that makes the model and its optimizer at step 0."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.num_steps,
    )
    tx = optax.adamw(schedule, weight_decay=config.weight_decay)

    def init() -> tuple[CNN, nnx.Optimizer]:
        model = make_model(config)()
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    return init


@nnx.jit
def accuracy(model: CNN, dataset: Batch) -> jax.Array:
    logits = nnx.view(model, deterministic=True, use_running_average=True)(dataset["image"])
    return jnp.mean(jnp.argmax(logits, axis=-1) == dataset["label"])
