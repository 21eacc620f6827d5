"""Prints the test accuracy of the averaged parameters of a run's best checkpoint.

    python examples/eval_digits_ema.py --config configs/digits_ema.py --workdir /tmp/ema

Which step is the best is written in the checkpoints. The state is that of `digits.py`, which knows
of no average: its parameters are filled with it.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import app, flags
from digits import accuracy, load_dataset, make_init
from ml_collections import config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Working directory of the run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_) -> None:
    state = fc.restore_train_state(
        Path(FLAGS.workdir) / "checkpoints",
        jax.eval_shape(make_init(FLAGS.config)),
        step="best",
        rename={"train_state/ema_params": "params", "params": "train_state/raw_params"},
        unexpected="ignore",  # the raw parameters
    )
    _, test_data = load_dataset()
    print(f"test accuracy {accuracy(state, test_data):.4f} at step {state.step}")


if __name__ == "__main__":
    app.run(main)
