"""Writes the checkpoints of this directory; run it under the Orbax release to write with.

    python -m venv /tmp/old && /tmp/old/bin/pip install orbax-checkpoint==0.11.25 flax
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        /tmp/old/bin/python tests/golden/make.py

makes `orbax-0.11.25.zip` beside this file. In it are one directory per tree of `TREES`, as
`save_pytree` (`save` from 0.12.0 on) of `orbax.checkpoint.experimental.v1` left it; per tree of
`FLAT`, as checkpointers of v0 did; and per way of `RUNS`, the root of a run of two steps. Those
here were made with jax 0.10.2, tensorstore 0.1.86 and Python 3.11. Each is a zip because a
checkpoint is some fifteen files of a few hundred bytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HERE = Path(__file__).parent
CUSTOM_METADATA = {"run": 7, "note": "größer"}


class Moments(NamedTuple):
    mu: Any
    nu: Any


def leaves() -> Any:
    """Every kind of leaf and node that all releases save."""
    floats = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    return {
        "jax": jnp.asarray(floats),
        "bf16": jnp.asarray(floats, jnp.bfloat16),
        "numpy": np.arange(5, dtype=np.int64),
        "rank0": jnp.asarray(3, jnp.int32),
        "numbers": [1, 2.5, True],
        "text": {"a/b": "größer"},
        "empty": {"none": None, "dict": {}, "list": []},
        "moments": Moments(jnp.ones(2), (jnp.zeros(3),)),
        "key": jax.random.key(3),
    }


def sharded() -> Any:
    """Arrays on 8 devices, some with replicas."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    values = np.arange(96, dtype=np.float32).reshape(16, 6)

    def put(*spec: Any) -> jax.Array:
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))

    return {"both": put("x", "y"), "replicas": put("x"), "everywhere": put()}


def plain() -> Any:
    """What is saved in plain files, as zarr 2."""
    return {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "n": 4}


def without_text() -> Any:
    """What v0's `StandardCheckpointer` saves, too: it knows no strings."""
    return {name: leaf for name, leaf in leaves().items() if name != "text"}


class State(TrainState):
    batch_stats: Any
    key: jax.Array


def state(step: int) -> State:
    """A training state after some updates."""
    params = {"dense": {"kernel": jnp.linspace(0, 1, 6).reshape(2, 3), "bias": jnp.zeros(3)}}
    made = State.create(
        apply_fn=max,
        params=params,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
        batch_stats={"mean": jnp.full(3, 0.5)},
        key=jax.random.key(step),
    )
    for _ in range(step):
        made = made.apply_gradients(grads=jax.tree.map(jnp.ones_like, made.params))
    return made


TREES = {"leaves": leaves, "sharded": sharded, "plain": plain}
FLAT = {"flat_standard": without_text, "flat_pytree": leaves, "flat_sharded": sharded}
RUNS = ("manager", "checkpointer")
STEPS = (1, 2)


def metrics(step: int) -> dict[str, float]:
    return {"loss": 0.5 * step}


def main() -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    save = getattr(ocp, "save", None) or ocp.save_pytree
    version = importlib.metadata.version("orbax-checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("leaves", "sharded"):
            save(os.path.join(folder, name), TREES[name](), custom_metadata=CUSTOM_METADATA)
        saving = ocp.options.ArrayOptions.Saving(use_ocdbt=False, use_zarr3=False)
        with ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
            save(os.path.join(folder, "plain"), plain())
        save_flat(Path(folder))
        save_runs(Path(folder))
        pack(Path(folder), HERE / f"orbax-{version}.zip")


def save_flat(folder: Path) -> None:
    import orbax.checkpoint as v0

    kinds = {"flat_pytree": v0.PyTreeCheckpointer}
    for name, tree in FLAT.items():
        with kinds.get(name, v0.StandardCheckpointer)() as checkpointer:
            checkpointer.save(folder / name, tree())


def save_runs(folder: Path) -> None:
    import orbax.checkpoint as v0
    import orbax.checkpoint.experimental.v1 as ocp

    options = v0.CheckpointManagerOptions(best_fn=lambda found: found["loss"], best_mode="min")
    with v0.CheckpointManager(folder / "manager", options=options) as manager:
        for step in STEPS:
            args = v0.args.StandardSave(state(step))
            manager.save(step, args=args, metrics=metrics(step))
    with ocp.training.Checkpointer(folder / "checkpointer") as checkpointer:
        save = getattr(checkpointer, "save", None) or checkpointer.save_pytree
        for step in STEPS:
            save(step, state(step), metrics=metrics(step), force=True)


def pack(folder: Path, target: Path) -> None:
    """The files of a folder as one archive, the same bytes for the same files."""
    with zipfile.ZipFile(target, "w", compresslevel=9) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                info = zipfile.ZipInfo(str(path.relative_to(folder)))  # of the year 1980
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())


if __name__ == "__main__":
    main()
