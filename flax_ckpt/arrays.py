"""Arrays: their types, and their abstract forms.

abstract = jax.tree.map(fc.arrays.to_shape_dtype_struct, params)
"""

from flax_ckpt.leaves.abstract import to_shape_dtype_struct
from flax_ckpt.leaves.types import (
    AbstractArray,
    AbstractScalar,
    AbstractShardedArray,
    ArrayLike,
    DType,
    Scalar,
    Shape,
)

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
