"""Leaves in host memory: NumPy arrays, copied when saved as they are mutable; numbers; strings.

A number is stored as a rank-0 array: an int as int64 or uint64, a float as float64; strings are in
`_strings.json`.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.format import arrays, tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.array import HOST
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target, show, show_array
from flax_ckpt.storage.store import Shard, whole

_KINDS: Final[dict[str, type]] = {"bool": bool, "int": int, "float": float}


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
        if isinstance(value, np.ma.MaskedArray):  # its mask would be lost
            return False
        return isinstance(value, np.ndarray | np.generic) and arrays.is_storable(value.dtype)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for NumPy values and types, and for what has shape and dtype but no sharding."""
        if isinstance(abstract, type):
            return issubclass(abstract, np.ndarray | np.generic)
        has = [hasattr(abstract, name) for name in ("shape", "dtype", "sharding")]
        return isinstance(abstract, np.dtype) or has == [True, True, False]

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        array = np.asarray(value)
        native = array.astype(array.dtype.newbyteorder("="), order="C", copy=copy)
        return host_write(tree.NUMPY, native)

    def describe(self, saved: SavedLeaf) -> Any:
        """A :class:`NumpyShapeDtype`."""
        return _wish(saved, None)

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        wish = _wish(saved, abstract)
        if saved.shape is None or saved.dtype is None or wish is None:
            return show(abstract)
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


class ScalarLeaf:
    """Saves and loads `int` from -2**63 to 2**64 - 1, `float` and `bool`."""

    value_types = (tree.SCALAR,)

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        if isinstance(value, np.generic):  # np.float64 is a float
            return False
        return -(2**63) <= value < 2**64 if isinstance(value, int) else isinstance(value, float)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for the types `int`, `float`, `bool`, and for their values."""
        if isinstance(abstract, np.generic):
            return False
        return isinstance(abstract, int | float) or abstract in (int, float, bool)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        return host_write(tree.SCALAR, np.asarray(value))  # int64, or uint64 where it has to be

    def describe(self, saved: SavedLeaf) -> Any:
        """The zero of its type, as Orbax has it: `0`, `0.0` or `False`."""
        return _KINDS.get(dtypes.kind(saved.dtype), float)()

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        if abstract is None and saved.dtype is not None:
            abstract = _KINDS.get(dtypes.kind(saved.dtype), complex)
        wanted: type = abstract if isinstance(abstract, type) else type(abstract)
        fits = saved.dtype is not None and (
            not rules.strict or dtypes.matches(saved.dtype, np.dtype(wanted), (), strict=True)
        )
        if not fits or saved.shape != ():
            return f"Python {wanted.__name__}"
        return Target(saved, ((),), wanted, rules.strict)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`."""
        return [_convert(part.item(), t) for t, (part,) in zip(targets, data, strict=True)]


def _convert(value: Any, target: Target) -> Any:
    wanted = target.abstract
    # As an int, neither NaN, infinity nor a complex number is anything.
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        result = wanted(value)
        if not target.strict or result == value or value != value:
            return result
    what = f"the saved number {value!r} does not fit a Python {wanted.__name__}"
    raise TreeMismatchError(f"{tree.show(target.saved.path)}: {what}")


class StringLeaf:
    """Saves and loads `str`."""

    value_types = (tree.STRING,)

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        return isinstance(value, str)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for `str` and for any string."""
        return abstract is str or isinstance(abstract, str)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        return LeafWrite(tree.STRING, string=str(value))

    def describe(self, saved: SavedLeaf) -> Any:
        """The word `string`, as Orbax has it."""
        return "string"

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        return Target(saved, (), str) if saved.value_type == tree.STRING else "a string"

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`; nothing is read, the saved leaf has the value."""
        return [target.saved.string for target in targets]
