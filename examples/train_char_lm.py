"""Trains a small transformer on the sources of Python's standard library, character by character.

    python examples/train_char_lm.py --config configs/char_lm.py --workdir /tmp/char_lm

Run it again with the same working directory and it resumes, with the position of the data: every
piece of text is seen once in an epoch, however often the run is killed.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
from absl import app, flags, logging
from char_lm import batches, load_text, loss_of, make_init
from flax.training.train_state import TrainState
from ml_collections import ConfigDict, config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory for the checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    loss_fn = functools.partial(loss_of, state.apply_fn)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), {"train/bits": loss}


def train(config: ConfigDict, workdir: Path) -> TrainState:
    text, _ = load_text(config.num_characters)
    iterator = batches(config, text)
    init = make_init(config)

    with fc.CheckpointCallback(
        workdir / "checkpoints",
        every_n_steps=config.checkpoint_every_steps,
        config=config,
        data_iterator=iterator,
    ) as ckpt:
        state, step = ckpt.restore_or_init(jax.eval_shape(init), init=init)
        logging.info("start at step %d", step)
        while step < config.num_steps:
            state, metrics = train_step(state, next(iterator))
            step += 1
            if step % config.log_every_steps == 0:
                logging.info("step %d: %.4f bits per character", step, metrics["train/bits"])
            ckpt.on_step_end(step, state, metrics=metrics)
    return state


def main(_) -> None:
    train(FLAGS.config, Path(FLAGS.workdir))


if __name__ == "__main__":
    app.run(main)
