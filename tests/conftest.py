"""Eight CPU devices for every test, and a way to run a program in a process of its own."""

from __future__ import annotations

import os

# Before anything imports jax: it reads both when its first device is asked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# A shell ignores it in what it starts in the background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_child(tmp_path: Path) -> Run:
    """Runs a program in a new interpreter; `check` is whether it must succeed."""

    def run(
        program: str, *args: object, devices: int = 1, check: bool = True, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
            env={**os.environ, "XLA_FLAGS": flags},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
