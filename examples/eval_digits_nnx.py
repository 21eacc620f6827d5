"""Prints the test accuracy of a run's newest checkpoint; the optimizer's state is not read.

python examples/eval_digits_nnx.py --config configs/digits_nnx.py --workdir /tmp/digits_nnx
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from digits import load_dataset
from digits_nnx import accuracy, make_model
from flax import nnx
from ml_collections import config_flags

import flax_ckpt as fc

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Hyperparameters.", lock_config=True)
flags.DEFINE_string("workdir", None, "Working directory of the run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_) -> None:
    abstract_model = nnx.eval_shape(make_model(FLAGS.config))
    restored = fc.restore(Path(FLAGS.workdir) / "checkpoints", abstract_model)
    _, test_data = load_dataset()
    print(f"test accuracy {accuracy(restored.state, test_data):.4f} at step {restored.step}")


if __name__ == "__main__":
    app.run(main)
