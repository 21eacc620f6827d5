"""Arrays: the types that signatures name, and abstract forms.

abstract = jax.tree.map(fc.arrays.to_shape_dtype_struct, params)
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, cast

import jax
import numpy as np
from jax.sharding import Sharding

from flax_ckpt.leaves.array import is_key

__all__ = ["ArrayLike", "DType", "Scalar", "Shape", "to_shape_dtype_struct"]
__all__ += ["AbstractArray", "AbstractScalar", "AbstractShardedArray"]

Shape: TypeAlias = tuple[int, ...]
DType: TypeAlias = np.dtype[Any]
Scalar: TypeAlias = int | float | np.number[Any] | bool
AbstractScalar: TypeAlias = Scalar | type[int] | type[float] | type[bool]


class AbstractArray(Protocol):
    """Says how to load a NumPy array: its shape and dtype."""

    @property
    def shape(self) -> Shape:
        """Its extents."""
        ...

    @property
    def dtype(self) -> Any:
        """Its dtype; another one than the saved is a cast."""


class AbstractShardedArray(AbstractArray, Protocol):
    """Says how to load a JAX array, as `jax.ShapeDtypeStruct` does."""

    @property
    def sharding(self) -> Sharding | None:
        """Where its parts go; None: as it was saved."""


ArrayLike: TypeAlias = AbstractArray | AbstractShardedArray


def to_shape_dtype_struct(
    arr: Any, dtype: Any = None, scalar_dtype: Callable[[Any], Any] | None = None
) -> Any:
    """Says how to load an array: its shape, dtype and sharding.

    Args:
        arr: a JAX or NumPy array, anything with `shape` and `dtype`, or a number.
        dtype: another dtype to load it in.
        scalar_dtype: `int` or `float`, what a number is to become; None: it stays.

    Returns:
        A `jax.ShapeDtypeStruct`, of typed keys that of their data; of a number the number.

    >>> to_shape_dtype_struct(np.ones((2, 3), np.float32), np.float16)
    ShapeDtypeStruct(shape=(2, 3), dtype=float16)
    """
    if isinstance(arr, int | float | np.number):
        return cast("Any", arr) if scalar_dtype is None else scalar_dtype(arr)
    if isinstance(arr, jax.Array) and is_key(arr.dtype):
        arr = jax.random.key_data(arr)
    placed = getattr(arr, "sharding", None)
    return jax.ShapeDtypeStruct(arr.shape, dtype or arr.dtype, sharding=placed)
