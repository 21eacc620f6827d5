"""What a process that trains, saves and restores has loaded, and what it has not."""

import json
import subprocess
import sys
from pathlib import Path

TRAIN_AND_RESTORE = """
import json, pickle, sys

import jax
import flax_ckpt as fc

def refuse(*args, **kwargs):
    raise AssertionError("pickle is used")

for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
    setattr(pickle, name, refuse)

sys.path.insert(0, {root!r})
from tests.training.states import create, train

root = {path!r}
state = train(create(), 0, 2)
with fc.CheckpointCallback(root, every_n_steps=1, config={{"lr": 0.1}}) as ckpt:
    ckpt.on_step_end(2, state, metrics={{"loss": 1.0}})
before = set(sys.modules)
back = fc.restore(root, jax.eval_shape(create))
print(json.dumps({{
    "orbax": sorted(name for name in sys.modules if name.partition(".")[0] == "orbax"),
    "step": int(back.state.step),
    "config": back.config.to_dict(),
    "new": sorted(name for name in set(sys.modules) - before if "evil" in name),
}}))
"""


def test_training_and_restoring_loads_no_orbax_and_unpickles_nothing(tmp_path: Path):
    root = Path(__file__).parents[1]
    script = TRAIN_AND_RESTORE.format(root=str(root), path=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == {"orbax": [], "step": 2, "config": {"lr": 0.1}, "new": []}
