"""What is told of a save or a restore: the one INFO line, and figures for `jax.monitoring`."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jax import monitoring

from flax_ckpt._async import logger as logger


class Writer(Protocol):
    """What takes scalars: one of CLU's metric writers, or any object with this method."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of a step."""


def line(path: str, step: int | None, nbytes: int, seconds: float, *more: str) -> str:
    """For example `step 1500 · 1.2 GB in 0.9 s (1.3 GB/s) · blocked 3 ms · checkpoints/1500`.

    Args:
        path: of the checkpoint; its last two parts are shown.
        step: of the run, if it is one.
        nbytes: size, in bytes.
        seconds: from the beginning to the end.
        more: what else there is to say.
    """
    rate = f" ({size(nbytes / seconds)}/s)" if seconds > 0 else ""
    what = "checkpoint" if step is None else f"step {step}"
    place = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
    return " · ".join([what, f"{size(nbytes)} in {duration(seconds)}{rate}", *more, place])


def record(event: str, **figures: float) -> dict[str, float]:
    """Gives figures to `jax.monitoring`: `/flax_ckpt/save/duration_secs` and the like.

    Returns:
        The same, named as a writer of scalars takes them: `checkpoint/save/duration_secs`.
    """
    for name, value in figures.items():
        is_time = name.endswith("_secs")
        tell = monitoring.record_event_duration_secs if is_time else monitoring.record_scalar
        tell(f"/flax_ckpt/{event}/{name}", value)
    return {f"checkpoint/{event}/{name}": float(value) for name, value in figures.items()}


def size(nbytes: float) -> str:
    """Bytes for people: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `3 ms`, `0.9 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.1f} s"


def nbytes(value: Any) -> int:
    """Bytes of the arrays of a tree; of one that is sharded over processes, all of them."""
    leaves = jax.tree.leaves(value)
    return sum(getattr(x, "nbytes", 8 * isinstance(x, int | float | complex)) for x in leaves)
