"""Arrays: the types that signatures name, and abstract forms.

abstract = jax.tree.map(fc.arrays.to_shape_dtype_struct, params)
"""

from typing import Any, Protocol, TypeAlias

import numpy as np
from jax.sharding import Sharding

from flax_ckpt.leaves.abstract import to_shape_dtype_struct

__all__ = [
    "AbstractArray",
    "AbstractScalar",
    "AbstractShardedArray",
    "ArrayLike",
    "DType",
    "Scalar",
    "Shape",
    "to_shape_dtype_struct",
]

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
        ...


class AbstractShardedArray(AbstractArray, Protocol):
    """Says how to load a JAX array, as `jax.ShapeDtypeStruct` does."""

    @property
    def sharding(self) -> Sharding | None:
        """Where its parts go; None: as it was saved."""
        ...


ArrayLike: TypeAlias = AbstractArray | AbstractShardedArray
