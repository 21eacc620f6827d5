"""NumPy leaves: arrays, copied when saved as they are mutable, and NumPy scalars."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flax_ckpt.format import arrays, tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.array import HOST
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target, show_array
from flax_ckpt.storage.store import Shard, whole


@dataclasses.dataclass(frozen=True)
class NumpyShapeDtype:
    """The abstract form of a NumPy array, as `jax.ShapeDtypeStruct` is that of a JAX array.

    Attributes:
        shape: the array's shape.
        dtype: its dtype.

    >>> NumpyShapeDtype((2, 3), np.dtype("int64"))
    NumpyShapeDtype(shape=(2, 3), dtype=dtype('int64'))
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NumpyLeaf:
    """Saves and loads `np.ndarray` and NumPy scalars; a scalar is stored as a rank-0 array."""

    value_types = (tree.NUMPY,)

    def handles(self, value: Any) -> bool:
        """True unless zarr has no such dtype: object, str, bytes, datetime, structured."""
        return (
            isinstance(value, np.ndarray | np.generic)
            and not isinstance(value, np.ma.MaskedArray)  # its mask would be lost
            and arrays.is_storable(value.dtype)
        )

    def handles_abstract(self, abstract: Any) -> bool:
        """True for NumPy values and types, and for what has shape and dtype but no sharding."""
        if isinstance(abstract, type):
            return issubclass(abstract, np.ndarray | np.generic)
        return isinstance(abstract, np.ndarray | np.generic | np.dtype) or (
            hasattr(abstract, "shape")
            and hasattr(abstract, "dtype")
            and not hasattr(abstract, "sharding")
        )

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        array = np.asarray(value)
        native = array.astype(array.dtype.newbyteorder("="), order="C", copy=copy)
        return host_write(tree.NUMPY, native)

    def describe(self, saved: SavedLeaf) -> Any:
        """A :class:`NumpyShapeDtype`."""
        assert saved.shape is not None
        assert saved.dtype is not None
        return NumpyShapeDtype(saved.shape, saved.dtype)

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        wish = _wish(saved, abstract)
        if saved.shape is None or saved.dtype is None or wish is None:
            return "a NumPy value" if wish is None else show_array(wish.shape, wish.dtype)
        fits = dtypes.matches(saved.dtype, wish.dtype, wish.shape, strict=rules.strict)
        if not rules.fits(saved.shape, wish.shape) or not fits:
            return f"{show_array(wish.shape, wish.dtype)} (numpy)"
        return Target(saved, (whole(wish.shape),), (wish, _is_scalar(abstract)), rules.strict)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`."""
        result: list[Any] = []
        for target, (part,) in zip(targets, data, strict=True):
            wish, scalar = target.abstract
            array = dtypes.convert(part, wish.dtype, target)
            result.append(array[()] if scalar else array)
        return result


def host_write(value_type: str, array: NDArray[Any]) -> LeafWrite:
    """A leaf that is one array in host memory."""
    shards = (Shard(arrays.origin(array.ndim), array),)
    return LeafWrite(value_type, array.shape, array.dtype, array.shape, shards, HOST)


def _is_scalar(abstract: Any) -> bool:
    return issubclass(abstract if isinstance(abstract, type) else type(abstract), np.generic)


def _wish(saved: SavedLeaf, abstract: Any) -> NumpyShapeDtype | None:
    """Shape and dtype of the array that is wanted; None if neither side has them."""
    if _is_scalar(abstract) and isinstance(abstract, type):
        return NumpyShapeDtype((), np.dtype(abstract))
    if hasattr(abstract, "dtype") and not isinstance(abstract, type):
        return NumpyShapeDtype(tuple(abstract.shape), np.dtype(abstract.dtype).newbyteorder("="))
    dtype = cast("Any", abstract if isinstance(abstract, np.dtype) else saved.dtype)
    return None if saved.shape is None else NumpyShapeDtype(saved.shape, dtype)
