"""When one dtype may stand for another, and the conversion of a single number.

Rank-0 numbers wander between Python, NumPy and JAX kinds: `TrainState.step` starts as a Python
int and becomes an int32 array. They match if the value fits; arrays do not convert unasked.
"""

from typing import Any, Final, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import Difference, TreeMismatchError
from flax_ckpt.format import tree
from flax_ckpt.leaves.base import Target

DType: TypeAlias = np.dtype[Any]
_dtypes: Any = jax.dtypes
is_kind = _dtypes.issubdtype  # knows the dtypes that NumPy does not

_KINDS = {"bool": np.bool_, "int": np.integer, "float": np.floating, "complex": np.complexfloating}
_WIDE: Final = frozenset(map(np.dtype, ("int64", "uint64", "float64", "complex128")))


def kind(dtype: Any) -> str:
    """`bool`, `int`, `float`, `complex`, or `other` for what is no number."""
    return next((name for name, parent in _KINDS.items() if is_kind(dtype, parent)), "other")


def matches(saved: DType, wanted: DType, shape: tuple[int, ...], *, strict: bool) -> bool:
    """Whether an array saved in one dtype may come back in the other.

    A cast that the caller names is done, except complex to real. In a strict load only rank-0
    numbers change their dtype, if the value fits; but not from one of JAX's precisions to another.
    """
    if saved == wanted:
        return True
    a, b = kind(saved), kind(wanted)
    if not strict:
        return a != "complex" or b == "complex"
    numbers = ("int", "float", "complex")
    if a == "complex" != b:
        return False
    if a == b and a in ("float", "complex") and not {saved, wanted} & _WIDE:
        return False
    return shape == () and (a == b or (a in numbers and b in numbers))


def canonical(dtype: DType) -> DType:
    """The dtype that JAX takes for this one: of 64 bits only with `jax_enable_x64`."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype)) if dtype in _WIDE else dtype


def convert(array: NDArray[Any], wanted: DType, target: Target) -> NDArray[Any]:
    """The array in another dtype; in a strict load a rank-0 number has to fit.

    Integers must be in range, and exact when they come from or become floats; 64-bit floats,
    Python's among them, may be rounded, but not to infinity.

    Raises:
        TreeMismatchError: the value does not fit.
    """
    if array.dtype == wanted:
        return array
    if array.ndim or not target.strict:
        return array.astype(wanted)
    exact = "int" in (kind(wanted), kind(array.dtype))
    with np.errstate(all="ignore"):
        result = array.astype(wanted)
        back = result.astype(array.dtype)
    same = back == array or (array != array and result != result)
    if kind(wanted) == kind(array.dtype) == "int":  # one may wrap, there and back
        same = array.item() == result.item()
    if not same and (exact or np.isfinite(back) != np.isfinite(array)):
        leaf, saved = tree.show(target.saved.path), f"{array.item()!r} ({array.dtype.name})"
        difference = Difference(leaf, saved, wanted.name)
        text = f"the saved number {saved} does not fit {wanted.name}"
        raise TreeMismatchError(f"{leaf}: {text}; restore it into a wider dtype", [difference])
    return result
