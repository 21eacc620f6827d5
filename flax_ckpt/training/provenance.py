"""Where a checkpoint comes from: commit, versions, devices, command line.

Kept in the saved config, where `restore(...).provenance` and any text editor find it.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import jax

_jax: Any = jax  # which says nothing about the type of its devices
_PACKAGES = ("jax", "flax", "optax", "flax-ckpt")


def collect() -> dict[str, Any]:
    """What is known of this process, but for what it trains.

    >>> sorted(collect())
    ['argv', 'device', 'git', 'versions']
    """
    versions = {name.replace("-", "_"): _version(name) for name in _PACKAGES}
    devices = _jax.devices()
    program: str | None = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "git": _git(program),
        "versions": {"python": platform.python_version()} | versions,
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "argv": [text.encode(errors="backslashreplace").decode() for text in sys.argv],
    }


def mesh(state: Any) -> dict[str, int] | None:
    """Axes and sizes of the mesh that a state is laid out on; None if it is on none."""
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return {str(axis): size for axis, size in sharding.mesh.shape.items()}
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def _git(program: str | None) -> dict[str, Any] | None:
    """The commit that the program's directory is at, and whether tracked files have changed."""
    try:
        directory = os.path.dirname(os.path.abspath(program)) if program else os.getcwd()
        commit = _run(directory, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository
    try:
        changes = _run(directory, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"commit": commit, "dirty": None}  # it answers too slowly
    return {"commit": commit, "dirty": bool(changes)}


def _run(directory: str, *command: str) -> str:
    run = subprocess.run(
        ["git", "--no-optional-locks", "-C", directory, *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=5,
    )
    return run.stdout.strip()
