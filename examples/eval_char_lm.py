"""Prints the test loss of a run's newest checkpoint, and text that the model writes.

    python examples/eval_char_lm.py --workdir /tmp/char_lm

The model is built from the config that is saved with the checkpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from char_lm import Windows, load_text, loss_of, make_init
from flax.training.train_state import TrainState

import flax_ckpt as fc

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Working directory of the run.")
flags.DEFINE_string("prompt", "def main(", "Beginning of the text.")
flags.DEFINE_integer("length", 300, "How many characters to write.")
flags.mark_flags_as_required(["workdir"])


def write(state: TrainState, prompt: str, length: int, context: int) -> str:
    """Returns the prompt, continued with characters that the model draws."""

    @jax.jit
    def draw(key: jax.Array, window: jax.Array, end: jax.Array) -> jax.Array:
        logits = state.apply_fn({"params": state.params}, window[None])[0, end]
        return jax.random.categorical(key, logits)

    text = prompt
    for key in jax.random.split(jax.random.key(0), length):
        codes = jnp.array(list(text.encode("ascii", "replace")[-context:]))
        window = jnp.pad(codes, (0, context - len(codes)))
        text += chr(int(draw(key, window, len(codes) - 1)))
    return text


def main(_) -> None:
    root = Path(FLAGS.workdir) / "checkpoints"
    config = fc.restore(root).config
    state = fc.restore_train_state(root, jax.eval_shape(make_init(config)))
    _, text = load_text(config.num_characters)
    pieces = Windows(text, config.context + 1)[:512]
    loss = jax.jit(functools.partial(loss_of, state.apply_fn))(state.params, pieces)
    print(f"test loss {loss:.4f} bits per character at step {state.step}")
    print(write(state, FLAGS.prompt, FLAGS.length, config.context))


if __name__ == "__main__":
    app.run(main)
