"""Teaches a network that was trained on digits to tell even from odd, by a new head alone.

    python examples/train_digits.py --config configs/digits.py --workdir /tmp/digits
    python examples/finetune_digits.py --config configs/finetune_digits.py --base /tmp/digits \\
        --workdir /tmp/parity

The first state is made of the other run's newest checkpoint. Run it again with the same working
directory and it resumes from its own checkpoints, which hold the base too.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from digits import Batch, TrainState, accuracy, batch_at
from ml_collections import ConfigDict, config_flags
from parity import load_dataset, make_init

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("base", None, "Working directory of a run of train_digits.py.")
flags.DEFINE_string("workdir", None, "Directory for the checkpoints.")
flags.mark_flags_as_required(["config", "base", "workdir"])


def start_from(base: Path, config: ConfigDict) -> TrainState:
    """Returns the state at step 0: what the base has learnt, under a head that is new."""
    init = make_init(config)
    out = fc.restore(
        base / "checkpoints",
        jax.eval_shape(init),
        only=["params", "train_state/batch_stats"],
        rename={
            "params": "params/base",
            "train_state/batch_stats": "train_state/batch_stats/base",
        },
        missing="init",  # the new head
        unexpected="ignore",  # the old one
        init=init,
    )
    logging.info("from step %s of %s: %s", out.step, base, out.report)
    return out.state


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits = state.apply_fn(variables, batch["image"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"train/loss": loss}


def train(config: ConfigDict, base: Path, workdir: Path) -> TrainState:
    train_data, test_data = load_dataset()
    batch = functools.partial(batch_at, train_data, batch_size=config.batch_size, seed=config.seed)

    with fc.CheckpointCallback(
        workdir / "checkpoints",
        every_n_steps=config.checkpoint_every_steps,
        config=config,
    ) as ckpt:
        state, step = ckpt.restore_or_init(
            jax.eval_shape(make_init(config)), init=lambda: start_from(base, config)
        )
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
    train(FLAGS.config, Path(FLAGS.base), Path(FLAGS.workdir))


if __name__ == "__main__":
    app.run(main)
