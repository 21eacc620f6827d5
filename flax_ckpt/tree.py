"""Trees: the types that signatures name, and merging.

merged = fc.tree.merge({"params": params}, {"step": 7})
"""

from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_ckpt.arrays import AbstractArray, AbstractScalar, AbstractShardedArray, Scalar
from flax_ckpt.handlers.merge import merge

__all__ = [
    "AbstractLeaf",
    "JsonType",
    "Leaf",
    "PyTree",
    "PyTreeKey",
    "PyTreeKeyPath",
    "PyTreeOf",
    "merge",
]

T = TypeVar("T")

Leaf: TypeAlias = jax.Array | np.ndarray[Any, Any] | Scalar | str
AbstractLeaf: TypeAlias = AbstractArray | AbstractShardedArray | AbstractScalar | str | type[str]
JsonType: TypeAlias = list["JsonValue"] | dict[str, "JsonValue"]
JsonValue: TypeAlias = str | int | float | bool | JsonType | None

if TYPE_CHECKING:  # any object is a tree, and jaxlib says nothing about the types of its keys
    PyTreeOf: TypeAlias = list[T] | Any
    PyTree: TypeAlias = Any
    PyTreeKey: TypeAlias = Any
else:
    PyTreeKey = SequenceKey | DictKey | GetAttrKey | FlattenedIndexKey

    class PyTreeOf(Generic[T]):
        """A tree of nested containers with leaves of type `T`."""

    class PyTree:
        """A tree of nested containers with any leaves."""


PyTreeKeyPath: TypeAlias = tuple[PyTreeKey, ...]
