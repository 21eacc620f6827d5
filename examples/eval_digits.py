"""Prints the test accuracy of a run's newest checkpoint.

python examples/eval_digits.py --config configs/digits.py --workdir /tmp/digits
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
    abstract_state = jax.eval_shape(make_init(FLAGS.config))
    state = fc.restore_train_state(Path(FLAGS.workdir) / "checkpoints", abstract_state)
    _, test_data = load_dataset()
    print(f"test accuracy {accuracy(state, test_data):.4f} at step {state.step}")


if __name__ == "__main__":
    app.run(main)
