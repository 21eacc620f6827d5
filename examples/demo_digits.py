"""What `make demo` runs: a training run that is killed and resumed, and the proof that it held.

Every part is a process of its own, as in real life:

1. `train_digits.py`, killed with SIGKILL once it has saved some steps;
2. `train_digits.py` again in the same working directory: it resumes and finishes;
3. `eval_digits.py` restores the result;
4. `train_digits.py` in another working directory, uninterrupted;
5. `read_with_orbax.py` reads the result with Orbax, without flax_ckpt.

The exit status is 0 only if the resumed run ends with the very bits of the uninterrupted one, in
parameters, optimizer state and batch statistics, and Orbax reads the same parameters.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # runs compare bit for bit on one kind of device

import jax
import numpy as np
from digits import make_init

import flax_ckpt as fc

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CONFIG = ROOT / "configs" / "digits.py"

KILL_AT_STEP = 300
MIN_ACCURACY = 0.97


def start(workdir: Path, script: str, *args: str | Path) -> subprocess.Popen[str]:
    """Starts an example; what it logs goes to `<workdir>/<script>.log`."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(log_of(workdir, script), "w") as log:
        command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def finish(process: subprocess.Popen[str], workdir: Path, script: str) -> str:
    """Waits for an example and returns what it printed; ends the demo if it failed."""
    printed, _ = process.communicate()
    if process.returncode != 0:
        tail = "".join(log_of(workdir, script).read_text().splitlines(keepends=True)[-15:])
        sys.exit(f"{tail}\n{script} failed with exit status {process.returncode}")
    return printed


def run(workdir: Path, script: str, *args: str | Path) -> str:
    return finish(start(workdir, script, *args), workdir, script)


def log_of(workdir: Path, script: str) -> Path:
    return workdir / f"{script}.log"


def flags(workdir: Path) -> tuple[str, ...]:
    return (f"--config={CONFIG}", f"--workdir={workdir}")


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that are complete: only then does a directory get its step's name."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def train_and_kill(workdir: Path) -> int:
    """Trains until a step from KILL_AT_STEP on is saved, kills, and returns the newest step."""
    process = start(workdir, "train_digits.py", *flags(workdir))
    while max(saved_steps(workdir), default=0) < KILL_AT_STEP:
        if process.poll() is not None:
            finish(process, workdir, "train_digits.py")
            sys.exit(f"train_digits.py ended without having saved step {KILL_AT_STEP}")
        time.sleep(0.005)
    process.kill()
    if process.wait() == 0:
        sys.exit("train_digits.py had finished before it was killed")
    return saved_steps(workdir)[-1]


def resume(workdir: Path) -> int:
    """Trains to the end and returns the step that it started from."""
    run(workdir, "train_digits.py", *flags(workdir))
    log = log_of(workdir, "train_digits.py").read_text()
    return int(re.search(r"start at step (\d+)", log)[1])


def leaves(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def bit_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def main(workdir: Path) -> int:
    interrupted, uninterrupted = workdir / "interrupted", workdir / "uninterrupted"
    for directory in (interrupted, uninterrupted):
        shutil.rmtree(directory, ignore_errors=True)
    config = runpy.run_path(str(CONFIG))["get_config"]()
    abstract_state = jax.eval_shape(make_init(config))

    print(f"Training on handwritten digits, in {os.path.relpath(workdir)}", flush=True)
    killed_at = train_and_kill(interrupted)
    print(f"  killed with SIGKILL after step {killed_at} was saved", flush=True)
    resumed_from = resume(interrupted)
    print(f"  resumed, trained to step {saved_steps(interrupted)[-1]}", flush=True)
    printed = run(interrupted, "eval_digits.py", *flags(interrupted))
    accuracy = float(re.search(r"test accuracy ([\d.]+)", printed)[1])
    print("  evaluated; now the same run without an interruption", flush=True)
    run(uninterrupted, "train_digits.py", *flags(uninterrupted))

    resumed = fc.restore_train_state(interrupted / "checkpoints", abstract_state)
    straight = fc.restore_train_state(uninterrupted / "checkpoints", abstract_state)
    same_state = bit_equal(leaves(resumed), leaves(straight))

    step_dir = interrupted / "checkpoints" / str(saved_steps(interrupted)[-1])
    read_back = interrupted / "params.npz"
    run(interrupted, "read_with_orbax.py", step_dir.resolve(), read_back)
    with np.load(read_back) as archive:
        same_params = bit_equal(dict(archive), leaves(resumed.params))

    files = [path for path in step_dir.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    payload = sum(leaf.nbytes for leaf in leaves(resumed).values())
    rows = {
        "resumed from step": f"{resumed_from} of {config.num_steps}",
        "test accuracy": f"{accuracy:.4f} (at least {MIN_ACCURACY})",
        "one step on disk": f"{size:,} bytes in {len(files)} files",
        "of these, the state's arrays": f"{payload:,} bytes",
        "bit-equal to an uninterrupted run": yes(same_state),
        "stock Orbax reads the same params": yes(same_params),
    }
    print()
    for label, value in rows.items():
        print(f"{label + ':':34} {value}")

    held = (
        resumed_from == killed_at
        and accuracy >= MIN_ACCURACY
        and same_state
        and same_params
        and int(resumed.step) == config.num_steps
    )
    if not held:
        print(f"\nThe demo failed; the logs are in {workdir}")
    return 0 if held else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, kill, resume, evaluate, compare.")
    parser.add_argument("--workdir", type=Path, default=ROOT / "build" / "demo")
    sys.exit(main(parser.parse_args().workdir))
