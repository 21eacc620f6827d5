"""Reads the parameters of one checkpoint with Orbax alone and writes them to a `.npz` file.

    python examples/read_with_orbax.py /tmp/digits/checkpoints/1000 /tmp/params.npz

Nothing here knows of flax_ckpt: a training step is a directory that Orbax reads. Its parts are
named, so that one can be asked for: `params`, `opt_state`, `train_state`, ...
"""

from __future__ import annotations

import sys

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp


def main(step_dir: str, out: str) -> None:
    params = ocp.load_checkpointables(step_dir, {"params": None})["params"]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    np.savez(out, **named)


if __name__ == "__main__":
    main(*sys.argv[1:])
