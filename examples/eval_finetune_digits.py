"""Prints how well a fine-tuned run's newest checkpoint tells even from odd.

    python examples/eval_finetune_digits.py --config configs/finetune_digits.py \\
        --workdir /tmp/parity

The checkpoint is complete: the run that the base came from is not needed.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import app, flags
from digits import accuracy
from ml_collections import config_flags
from parity import load_dataset, make_init

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
