"""Trains on digits, averages the parameters as it goes, and keeps the two best averages.

    python examples/train_digits_ema.py --config configs/digits_ema.py --workdir /tmp/ema

Told to end by SIGTERM, as clusters do before they take a machine away, it saves one more step and
leaves with exit status 143. Run it again with the same working directory and it resumes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from digits import Batch, accuracy, batch_at
from ml_collections import ConfigDict, config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Directory for the checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


class TrainState(digits.TrainState):
    """The state of `digits.py`, with an exponential moving average of the parameters."""

    ema_params: Any


def make_init(config: ConfigDict) -> Callable[[], TrainState]:
    """Returns the function that makes the state at step 0."""
    init = digits.make_init(config)

    @jax.jit
    def init_with_ema() -> TrainState:
        state = init()
        return TrainState(**vars(state), ema_params=state.params)

    return init_with_ema


@functools.partial(jax.jit, donate_argnums=0, static_argnames="decay")
def train_step(
    state: TrainState, batch: Batch, *, decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
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
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    ema_params = optax.incremental_update(state.params, state.ema_params, 1 - decay)
    return state.replace(ema_params=ema_params), {"train/loss": loss}


def train(config: ConfigDict, workdir: Path) -> TrainState:
    data, _ = digits.load_dataset()
    train_data = {name: values[config.num_eval :] for name, values in data.items()}
    eval_data = {name: values[: config.num_eval] for name, values in data.items()}
    batch = functools.partial(batch_at, train_data, batch_size=config.batch_size, seed=config.seed)
    init = make_init(config)

    with fc.CheckpointCallback(
        workdir / "checkpoints",
        every_n_steps=config.checkpoint_every_steps,
        keep_last=1,
        keep_best=("eval/accuracy", "max", 2),
        config=config,
    ) as ckpt:
        state, step = ckpt.restore_or_init(jax.eval_shape(init), init=init)
        logging.info("start at step %d", step)
        while step < config.num_steps:
            state, metrics = train_step(state, batch(step), decay=config.ema_decay)
            step += 1
            if ckpt.should_save(step):
                metrics["eval/accuracy"] = accuracy(
                    state.replace(params=state.ema_params), eval_data
                )
            if step % config.log_every_steps == 0:
                logging.info("step %d: %s", step, {k: f"{v:.4f}" for k, v in metrics.items()})
            ckpt.on_step_end(step, state, metrics=metrics)
    return state


def main(_) -> None:
    train(FLAGS.config, Path(FLAGS.workdir))


if __name__ == "__main__":
    app.run(main)
