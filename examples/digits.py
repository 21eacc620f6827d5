"""Handwritten digits: the data, the network and its train state.

`train_digits.py` and `eval_digits.py` share this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Batch = dict[str, np.ndarray]

NUM_TEST = 360


def load_dataset() -> tuple[Batch, Batch]:
    """Returns the train and test split: 1,437 and 360 images of 8x8 pixels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    split = train_test_split(images, labels, test_size=NUM_TEST, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    return (
        {"image": train_images, "label": train_labels},
        {"image": test_images, "label": test_labels},
    )


def batch_at(dataset: Batch, step: int, *, batch_size: int, seed: int) -> Batch:
    """Returns the batch of a step, the same one in every run with this seed.

    Each epoch is a new permutation. Nothing has to be saved for a resumed run to go on with the
    data that an uninterrupted one would have seen.
    """
    steps_per_epoch = len(dataset["label"]) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset["label"]))
    rows = order[position * batch_size : (position + 1) * batch_size]
    return {name: values[rows] for name, values in dataset.items()}


class CNN(nn.Module):
    """Convolutions, each with batch normalization and pooling, and a linear classifier.

    Without classes it returns the features that the classifier would have seen.
    """

    features: tuple[int, ...]
    dtype: Any = jnp.float32
    num_classes: int | None = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for features in self.features:
            x = nn.Conv(features, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
            x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        return x if self.num_classes is None else nn.Dense(self.num_classes)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


def make_init(config: ConfigDict) -> Callable[[], TrainState]:
    """Returns the function that makes the state at step 0."""
    model = CNN(features=tuple(config.features), dtype=jnp.dtype(config.dtype))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.num_steps,
    )
    tx = optax.adamw(schedule, weight_decay=config.weight_decay)

    @jax.jit
    def init() -> TrainState:
        variables = model.init(jax.random.key(config.seed), jnp.ones((1, 8, 8, 1)), train=False)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=tx,
            batch_stats=variables["batch_stats"],
        )

    return init


@jax.jit
def accuracy(state: TrainState, dataset: Batch) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, dataset["image"], train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == dataset["label"])
