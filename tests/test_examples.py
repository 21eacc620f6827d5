"""The examples run as they stand, with fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flax_ckpt as fc

ROOT = Path(__file__).parents[1]
SMALL = ("--config.features=(8, 16)", "--config.checkpoint_every_steps=30")


def run(script: str, workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    example = [str(ROOT / "examples" / f"{script}.py"), f"--workdir={workdir}", *flags]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *example],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def leaves(step: Path) -> dict[str, bytes]:
    """The bits of all leaves by path; of random streams, those of the key's data."""
    pairs = jax.tree_util.tree_flatten_with_path(fc.restore(step).state)[0]
    return {jax.tree_util.keystr(path): bits(leaf) for path, leaf in pairs}


def bits(leaf: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


@pytest.mark.parametrize("kind", ["digits", "digits_nnx"])
def test_digits_trains_resumes_and_evaluates(tmp_path: Path, kind: str) -> None:
    """A run that was cut off ends with the bits of one that was not."""
    flags = (f"--config={ROOT}/configs/{kind}.py", *SMALL)
    train, evaluate = f"train_{kind}", f"eval_{kind}"
    schedule = "--config.warmup_steps=20"
    run(train, tmp_path / "whole", *flags, schedule, "--config.num_steps=90")
    checkpoints = tmp_path / "cut" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "30").rename(checkpoints / "30")
    done = run(train, tmp_path / "cut", *flags, schedule, "--config.num_steps=90")
    assert "start at step 30" in done.stderr
    assert leaves(checkpoints / "90") == leaves(tmp_path / "whole" / "checkpoints" / "90")
    done = run(evaluate, tmp_path / "cut", *flags)
    accuracy = re.fullmatch(r"test accuracy ([\d.]+) at step 90\n", done.stdout)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 0.5
