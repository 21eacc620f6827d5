"""Host memory as JAX arrays that are bound to no device, many at a time.

`jax.device_put(list)` spends 25 µs on an array, most of them in Python on what is the same for
all of a kind: a tree of 5,000 leaves takes longer to hand over than to read. What it calls in the
end takes 4 µs, but is no public function; where it is missing, the public one does it all.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax._src.interpreters import pxla
from jax.core import Tracer
from numpy.typing import NDArray

_put: Any = getattr(pxla, "batched_device_put", None)


def to_device(arrays: Sequence[NDArray[Any]]) -> list[jax.Array]:
    """The arrays on JAX's default device; on CPU aligned memory is adopted, not copied."""
    if _put is None:
        return jax.device_put(list(arrays))
    first: dict[Any, Any] = {}  # of each kind, put there by JAX: the others are made like it
    result: list[jax.Array] = []
    for array in arrays:
        kind = array.shape, array.dtype
        if (like := first.get(kind)) is None:
            made: Any = jax.device_put(array)
            if isinstance(made, Tracer):  # within `jit`, where it becomes a constant
                return jax.device_put(list(arrays))
            first[kind] = made.aval, made.sharding, list(made.devices())
        else:
            aval, placed, devices = like
            made = _put(aval, placed, [array], devices, committed=False)
        result.append(made)
    return result
