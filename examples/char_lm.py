"""A character-level language model of Python's own sources: the data and the network.

`train_char_lm.py` and `eval_char_lm.py` share this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from ml_collections import ConfigDict

VOCABULARY = 128  # ASCII; any other character becomes a question mark


def load_text(num_characters: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text to train on, and a tenth of it to test on, as arrays of character codes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)[:num_characters]
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    return codes[: -len(codes) // 10], codes[-len(codes) // 10 :]


class Windows:
    """A data source for Grain: pieces of a text, one after the other."""

    def __init__(self, text: np.ndarray, length: int) -> None:
        self._pieces = text[: len(text) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self._pieces[index]


def batches(config: ConfigDict, text: np.ndarray) -> grain.DatasetIterator:
    """Returns batches without end, uint8[batch_size, context + 1], each epoch in another order."""
    dataset = grain.MapDataset.source(Windows(text, config.context + 1)).shuffle(seed=config.seed)
    return iter(dataset.repeat().batch(config.batch_size).to_iter_dataset())


class Transformer(nn.Module):
    """Predicts the next character at each place, from those up to there."""

    num_layers: int
    num_heads: int
    width: int
    context: int

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        places = self.param("places", nn.initializers.normal(0.02), (self.context, self.width))
        x = nn.Embed(VOCABULARY, self.width)(characters) + places[: characters.shape[1]]
        mask = nn.make_causal_mask(characters)
        for _ in range(self.num_layers):
            x += nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def make_init(config: ConfigDict) -> Callable[[], TrainState]:
    """Returns the function that makes the state at step 0."""
    model = Transformer(config.num_layers, config.num_heads, config.width, config.context)
    schedule = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def init() -> TrainState:
        characters = jnp.zeros((1, config.context), jnp.int32)
        params = model.init(jax.random.key(config.seed), characters)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    return init


def loss_of(apply_fn: Callable[..., jax.Array], params: dict, batch: jax.Array) -> jax.Array:
    """Returns the mean loss in bits per character."""
    logits = apply_fn({"params": params}, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean() / jnp.log(2)
