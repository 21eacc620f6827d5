"""The types of trees and arrays in signatures, public as `flax_ckpt.tree` and `flax_ckpt.arrays`.

    def save_params(params: tree.PyTreeOf[jax.Array]) -> None: ...

They are for people and type checkers; nothing here runs.
"""

from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

# A leaf of an abstract tree that is not to be loaded: it stays as it is.
PLACEHOLDER: Final[EllipsisType] = ...

T = TypeVar("T")


class PyTreeOf(Generic[T]):
    """A tree of nested containers with leaves of type `T`; any object is one."""


class PyTree:
    """A tree of nested containers with any leaves."""


if TYPE_CHECKING:  # jaxlib says nothing about the types of its keys
    PyTreeKey: TypeAlias = Any
else:
    PyTreeKey = SequenceKey | DictKey | GetAttrKey | FlattenedIndexKey
PyTreeKeyPath: TypeAlias = tuple[PyTreeKey, ...]
JsonType: TypeAlias = list["JsonValue"] | dict[str, "JsonValue"]
JsonValue: TypeAlias = str | int | float | bool | JsonType | None

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
Leaf: TypeAlias = jax.Array | np.ndarray[Any, Any] | Scalar | str
AbstractLeaf: TypeAlias = AbstractArray | AbstractShardedArray | AbstractScalar | str | type[str]
