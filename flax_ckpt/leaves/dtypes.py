"""When one dtype may stand for another, and the conversion of a single number.

Rank-0 numbers wander between Python, NumPy and JAX kinds: `TrainState.step` starts as a Python
int and becomes an int32 array. They match if the value fits; arrays do not convert unasked.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import TreeMismatchError


def is_kind(dtype: Any, parent: Any) -> bool:
    """`jax.dtypes.issubdtype`, which knows the dtypes that NumPy does not."""
    dtypes: Any = jax.dtypes
    return dtypes.issubdtype(dtype, parent)


def kind(dtype: Any) -> str:
    """`bool`, `int`, `float`, `complex`, or `other` for what is no number."""
    for name, parent in (
        ("bool", np.bool_),
        ("int", np.integer),
        ("float", np.floating),
        ("complex", np.complexfloating),
    ):
        if is_kind(dtype, parent):
            return name
    if dtype in (np.dtype(ml_dtypes.int2), np.dtype(ml_dtypes.int4)):
        return "int"
    return "other"


def castable(saved: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Whether a cast that the caller names is done: all, except complex to real."""
    return saved == wanted or not (kind(saved) == "complex" and kind(wanted) != "complex")


def same_rank0_family(saved: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Whether a rank-0 number of one dtype may come back in the other if its value fits."""
    order = ["int", "float", "complex"]
    a, b = kind(saved), kind(wanted)
    return a == b or (a in order and b in order)


def fit(value: NDArray[Any], wanted: np.dtype[Any], leaf: str) -> NDArray[Any]:
    """A rank-0 number in another dtype.

    Integers must be in range, and exact when they come from or become floats; floats may be
    rounded, but not to infinity.

    Raises:
        TreeMismatchError: the value does not fit.
    """
    if value.dtype == wanted:
        return value
    exact = kind(wanted) == "int" or kind(value.dtype) == "int"
    with np.errstate(all="ignore"):
        result = value.astype(wanted)
        back = result.astype(value.dtype)
        good = back == value or (value != value and result != result)
        if not exact:
            good = good or bool(np.isfinite(back) == np.isfinite(value))
    if not good:
        raise TreeMismatchError(
            f"{leaf}: the saved number {value.item()!r} ({value.dtype.name}) does not fit"
            f" {wanted.name}; restore it into a wider dtype"
        )
    return result


def canonical(dtype: np.dtype[Any]) -> bool:
    """Whether JAX keeps this dtype as it is: 64-bit ones only with `jax_enable_x64`."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype)) == dtype
