"""Has an older Orbax release read what we write. It is run by hand: `make.py` says how to get one.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu
    python -m tests.golden.read_ours write /tmp/ours            # with flax_ckpt
    /tmp/old/bin/python -m tests.golden.read_ours read /tmp/ours

Orbax 0.11.25, 0.11.33 and 0.12.2 find everything equal, with jax 0.10.2 and tensorstore 0.1.86.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.golden import make

PARTS = ("params", "opt_state", "train_state")


def write(folder: Path) -> None:
    import flax_ckpt as fc

    for name, tree in make.TREES.items():
        fc.save(folder / name, tree())
    with fc.CheckpointCallback(folder / "run", every_n_steps=1) as callback:
        for step in make.STEPS:
            callback.on_step_end(step, make.state(step), metrics=make.metrics(step))


def parts_of(state: Any) -> dict[str, Any]:
    rest = {name: getattr(state, name) for name in ("step", "batch_stats", "key")}
    return {"params": state.params, "opt_state": state.opt_state, "train_state": rest}


def read(folder: Path) -> None:
    for what, check in CHECKS.items():
        try:
            check(folder)
            print(f"{what}: equal")
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {error}".splitlines()[0][:160])


def same(found: Any, expected: Any) -> None:
    """Leaves are compared, bit for bit; nodes come back as dicts and lists."""
    left, right = (jax.tree.leaves(tree) for tree in (found, expected))
    assert len(left) == len(right), f"{len(left)} leaves, expected {len(right)}"
    for a, b in zip(left, right, strict=True):
        if isinstance(b, jax.Array) and jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype, (a, b)
        assert np.array_equal(np.asarray(a), np.asarray(b)), (a, b)


def v1_load(name: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        import orbax.checkpoint.experimental.v1 as ocp

        load = getattr(ocp, "load", None) or ocp.load_pytree
        same(load(folder / name, checkpointable_name="state"), make.TREES[name]())
        same(ocp.load_checkpointables(folder / name)["state"], make.TREES[name]())

    return check


def v0_load(name: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        import orbax.checkpoint as v0

        with v0.PyTreeCheckpointer() as checkpointer:
            same(checkpointer.restore(folder / name / "state"), make.TREES[name]())

    return check


def v0_manager(folder: Path) -> None:
    import orbax.checkpoint as v0

    args = v0.args.Composite(**{name: v0.args.PyTreeRestore() for name in PARTS})
    with v0.CheckpointManager(folder / "run") as manager:
        assert list(manager.all_steps()) == list(make.STEPS)
        for step in make.STEPS:
            found = manager.restore(step, args=args)
            same({name: found[name] for name in PARTS}, parts_of(make.state(step)))


def v0_manager_without_args(folder: Path) -> None:
    import orbax.checkpoint as v0

    with v0.CheckpointManager(folder / "run") as manager:
        found = manager.restore(1)
    same({name: found[name] for name in PARTS}, parts_of(make.state(1)))


def v1_checkpointer(folder: Path) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    with ocp.training.Checkpointer(folder / "run") as checkpointer:
        assert sorted(c.step for c in checkpointer.checkpoints) == list(make.STEPS)
        found = checkpointer.load_checkpointables(2, dict.fromkeys(PARTS))
    same(found, parts_of(make.state(2)))


CHECKS: dict[str, Callable[[Path], None]] = {
    **{f"v1 load of {name}": v1_load(name) for name in make.TREES},
    **{f"v0 restore of {name}": v0_load(name) for name in make.TREES},
    "v0 CheckpointManager": v0_manager,
    "v0 CheckpointManager without args": v0_manager_without_args,
    "v1 training.Checkpointer": v1_checkpointer,
}

if __name__ == "__main__":
    print(f"orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}")
    {"write": write, "read": read}[sys.argv[1]](Path(os.path.abspath(sys.argv[2])))
