"""Paths, as handlers and name formats have them; the names are Orbax v1's."""

from etils.epath import Path

from flax_ckpt.handlers.base import PathAwaitingCreation
from flax_ckpt.path import step
from flax_ckpt.storage.files import PathLike

__all__ = ["Path", "PathAwaitingCreation", "PathLike", "step"]
