"""Typed PRNG keys (`jax.random.key`): their key data as an array, the implementation beside it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.leaves.array import ArrayLeaf, is_key
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target, show_array

_ARRAYS = ArrayLeaf()


class KeyLeaf:
    """Saves and loads arrays of typed keys."""

    value_types = ()  # in `_METADATA` keys are arrays; `SavedLeaf.key_impl` tells

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        return isinstance(value, jax.Array) and is_key(value.dtype)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for arrays and `ShapeDtypeStruct` of a key dtype."""
        is_array = hasattr(abstract, "dtype") and not isinstance(abstract, type)
        return is_array and is_key(abstract.dtype)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        written = _ARRAYS.write(jax.random.key_data(value), copy=copy)
        return written.replace(key_impl=str(jax.random.key_impl(value)))

    def describe(self, saved: SavedLeaf) -> Any:
        """A `ShapeDtypeStruct` of the key dtype and the logical shape."""
        assert saved.shape is not None
        return jax.ShapeDtypeStruct(saved.shape[:-1], _key_dtype(saved.key_impl))

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`; the key's logical shape or that of its data may be asked."""
        if saved.key_impl is None or saved.shape is None:
            return show_array(abstract.shape, abstract.dtype)
        if abstract is None or isinstance(abstract, type):
            return _ARRAYS.target(saved, jax.Array, rules)
        logical = is_key(abstract.dtype)
        expected = saved.shape[:-1] if logical else saved.shape
        dtype = _key_dtype(saved.key_impl) if logical else np.uint32
        if tuple(abstract.shape) != expected or abstract.dtype != dtype:
            return show_array(abstract.shape, abstract.dtype)
        placed = abstract.sharding  # fits the key data too: the trailing axis is not split
        if isinstance(abstract, jax.Array) and logical:
            placed = jax.random.key_data(abstract).sharding if abstract.committed else None
        wish = jax.ShapeDtypeStruct(saved.shape, np.dtype(np.uint32), sharding=placed)
        return _ARRAYS.target(saved, wish, rules)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`."""
        arrays = _ARRAYS.build(targets, data)
        return [
            jax.random.wrap_key_data(array, impl=target.saved.key_impl)
            for array, target in zip(arrays, targets, strict=True)
        ]


@functools.lru_cache(maxsize=16)
def _key_dtype(impl: str | None) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
