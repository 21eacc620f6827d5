"""Where a checkpoint comes from: commit, versions, devices, command line.

Kept in the saved config, where `restore(...).provenance` and any text editor find it.
"""

import os
import platform
import subprocess
import sys
from typing import Any

import jax

from flax_ckpt import _save

_jax: Any = jax  # which says nothing about the type of its devices
_PACKAGES = ("jax", "flax", "optax", "flax-ckpt")


def collect() -> dict[str, Any]:
    """What is known of this process, but for what it trains.

    >>> sorted(collect())
    ['argv', 'device', 'git', 'versions']
    """
    versions = {name.replace("-", "_"): _save.version(name) for name in _PACKAGES}
    devices = _jax.devices()
    return {
        "git": _git(getattr(sys.modules.get("__main__"), "__file__", None)),
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


def _git(program: str | None) -> dict[str, Any] | None:
    """The commit that the program's directory is at, and whether tracked files have changed."""
    directory = os.path.dirname(program or "") or "."
    commit = _run(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _run(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _run(directory: str, *command: str) -> str | None:
    """What git says; None if there is no git or no repository, or it answers too slowly."""
    git = ["git", "--no-optional-locks", "-C", directory, *command]
    try:
        said = subprocess.check_output(git, stderr=subprocess.DEVNULL, errors="replace", timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip()
