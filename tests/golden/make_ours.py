"""Writes checkpoints of every kind with this version, for every later one to load.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        python -m tests.golden.make_ours

makes `flax-ckpt-<version>.zip` beside this file; those of earlier versions stay. In it are one
directory per tree of `TREES`, saved with the options of `OPTIONS`; `partial`, saved in two calls;
`processes`, saved by two; and the roots of two runs, of a Linen state and of an NNX module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_ckpt as fc
from tests.golden import make
from tests.storage import test_processes as processes
from torture.damage import Rows

VERSION = importlib.metadata.version("flax-ckpt")
CONFIG = {"lr": 0.1, "layers": (1, 2), "name": "größer"}
HALVES = {"first": {"w": np.arange(6.0), "t": "one"}, "second": {"n": 2, "t": "two"}}


def large() -> Any:
    """What is cut into several chunks and files."""
    values = np.random.default_rng(0).integers(0, 9, 6000)
    return {"a": values.reshape(60, 100), "b": jnp.asarray(values[:4096], jnp.bfloat16)}


TREES: dict[str, Callable[[], Any]] = {
    "leaves": make.leaves,
    "sharded": make.sharded,
    "chunks": large,
    "compressed": large,
    "zarr2": make.leaves,
    "zarr2_compressed": large,
    "files": make.leaves,
    "files_sharded": make.sharded,
    "files_zarr2": make.leaves,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"ocdbt_target_data_file_size": 20_000},
    "compressed": {"use_compression": True},
    "zarr2": {"use_zarr3": False},
    "zarr2_compressed": {"use_zarr3": False, "use_compression": True},
    "files": {"use_ocdbt": False},
    "files_sharded": {"use_ocdbt": False},
    "files_zarr2": {"use_ocdbt": False, "use_zarr3": False},
}


def context(name: str) -> fc.Context:
    made = fc.Context()
    for option, value in OPTIONS.get(name, {}).items():
        setattr(made.array.saving, option, value)
    if TREES[name] is large:
        made.array.saving.storage_options.chunk_byte_size = 8_000
    return made


@dataclasses.dataclass
class Model:
    """Makes the module of the second run."""

    seed: int = 0

    def __call__(self) -> nnx.Module:
        rngs = nnx.Rngs(self.seed)
        return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))


def runs() -> Iterator[tuple[str, int, Any]]:
    """The steps of both runs, and their states."""
    yield from (("linen", step, make.state(step)) for step in make.STEPS)
    yield from (("nnx", step, Model(step)()) for step in make.STEPS)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        sys.argv, os.environ["GIT_DIR"] = ["make_ours.py"], name  # provenance names neither place
        for case, tree in TREES.items():
            with context(case):
                fc.save(folder / case, tree(), custom_metadata=make.CUSTOM_METADATA)
        for half in HALVES.values():
            fc.partial.save(folder / "partial", {half["t"]: half})
        fc.partial.finalize(folder / "partial")
        for done in processes.run_two("fc.save(path, tree())", folder / "processes"):
            assert done.code == 0, done.err
        for run, step, state in runs():
            options: Any = {"keep_last": None, "config": CONFIG, "data_iterator": Rows(step)}
            with fc.CheckpointCallback(folder / run, every_n_steps=1, **options) as callback:
                callback.restore_or_init(state, restart_data=True)
                callback.on_step_end(step, state, metrics=make.metrics(step))
        make.pack(folder, make.HERE / f"flax-ckpt-{VERSION}.zip")


if __name__ == "__main__":
    main()
