"""The examples as programs: each in a process of its own, with values of its config set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(script: str, workdir: Path, *flags: str, **config: object) -> subprocess.Popen[str]:
    """Starts an example; those that share a parent of their working directory compile once."""
    command = [sys.executable, f"examples/{script}.py", f"--workdir={workdir}", *flags]
    command += [f"--config.{name}={value}" for name, value in config.items()]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Waits for an example; returns what it printed and what it logged."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err
