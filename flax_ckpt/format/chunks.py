"""Chunk shapes where the user says how to cut an array.

    cut((8, 6), 4, axes=(1,), limit=64) == (8, 2)

Every chunk divides its shard, so that each process writes whole chunks.
"""

import math


def cut(
    shard_shape: tuple[int, ...], itemsize: int, *, axes: tuple[int, ...], limit: int
) -> tuple[int, ...]:
    """A chunk shape that divides a shard.

    Args:
        shard_shape: what one process writes of the array.
        itemsize: bytes per element.
        axes: axes that are cut first, each at least once if it can be.
        limit: greatest size of a chunk in bytes; only chunks of one element may be larger.

    Raises:
        ValueError: an axis is negative.
    """
    if min(axes, default=0) < 0:
        raise ValueError(f"storage_options.shard_axes must be 0 or more, got {axes}")
    chunk = [max(extent, 1) for extent in shard_shape]
    axes = tuple(axis for axis in axes if axis < len(chunk))
    for axis in axes:
        chunk[axis] //= _smallest_factor(chunk[axis])
    while math.prod(chunk) * itemsize > limit and max(chunk, default=1) > 1:
        above_1 = [axis for axis, extent in enumerate(chunk) if extent > 1]
        # Without a wish the first axis: what is left then lies together in the shard.
        wanted = [axis for axis in axes if axis in above_1] or above_1[:1]
        axis = max(wanted, key=chunk.__getitem__)
        chunk[axis] //= _smallest_factor(chunk[axis])
    return tuple(chunk)


def _smallest_factor(n: int) -> int:
    """The smallest prime that divides n; 1 of 1."""
    return next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)
