"""Trains a small convolutional network on scikit-learn's handwritten digits.

    python examples/train_digits.py --config configs/digits.py --workdir /tmp/digits

Run it again with the same working directory and it resumes: with the state, the step and the data
order of its newest checkpoint. Any value of the config can be set: `--config.num_steps=1000`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from digits import Batch, TrainState, accuracy, batch_at, load_dataset, make_init
from ml_collections import ConfigDict, config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory for the checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), {"train/loss": loss}


def train(config: ConfigDict, workdir: Path) -> TrainState:
    train_data, test_data = load_dataset()
    batch = functools.partial(batch_at, train_data, batch_size=config.batch_size, seed=config.seed)
    init = make_init(config)

    with fc.CheckpointCallback(
        workdir / "checkpoints",
        every_n_steps=config.checkpoint_every_steps,
        keep_last=3,
        config=config,
    ) as ckpt:
        state, step = ckpt.restore_or_init(jax.eval_shape(init), init=init)
        logging.info("start at step %d", step)
        while step < config.num_steps:
            state, metrics = train_step(state, batch(step))
            step += 1
            if step % config.eval_every_steps == 0 or step == config.num_steps:
                metrics["test/accuracy"] = accuracy(state, test_data)
                logging.info("step %d: %s", step, {k: f"{v:.4f}" for k, v in metrics.items()})
            ckpt.on_step_end(step, state, metrics=metrics)
    return state


def main(_) -> None:
    train(FLAGS.config, Path(FLAGS.workdir))


if __name__ == "__main__":
    app.run(main)
