"""Trains a small convolutional network of NNX on scikit-learn's handwritten digits.

    python examples/train_digits_nnx.py --config configs/digits_nnx.py --workdir /tmp/digits_nnx

Run it again with the same working directory and it resumes: with the model, its batch statistics
and random streams, the optimizer, the step and the data order of its newest checkpoint. Any value
of the config can be set: `--config.num_steps=1000`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from digits import Batch, batch_at, load_dataset
from digits_nnx import CNN, accuracy, make_init
from flax import nnx
from ml_collections import ConfigDict, config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory for the checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, batch: Batch) -> dict[str, jax.Array]:
    """Updates the model and the optimizer in place."""

    def loss_fn(model: CNN) -> jax.Array:
        logits = model(batch["image"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return {"train/loss": loss}


def train(config: ConfigDict, workdir: Path) -> CNN:
    train_data, test_data = load_dataset()
    batch = functools.partial(batch_at, train_data, batch_size=config.batch_size, seed=config.seed)
    init = make_init(config)

    with fc.CheckpointCallback(
        workdir / "checkpoints",
        every_n_steps=config.checkpoint_every_steps,
        keep_last=3,
        config=config,
    ) as ckpt:
        (model, optimizer), step = ckpt.restore_or_init(nnx.eval_shape(init), init=init)
        logging.info("start at step %d", step)
        while step < config.num_steps:
            metrics = train_step(model, optimizer, batch(step))
            step += 1
            if step % config.eval_every_steps == 0 or step == config.num_steps:
                metrics["test/accuracy"] = accuracy(model, test_data)
                logging.info("step %d: %s", step, {k: f"{v:.4f}" for k, v in metrics.items()})
            ckpt.on_step_end(step, (model, optimizer), metrics=metrics)
    return model


def main(_) -> None:
    train(FLAGS.config, Path(FLAGS.workdir))


if __name__ == "__main__":
    app.run(main)
