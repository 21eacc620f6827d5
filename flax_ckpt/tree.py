"""Trees: the types that signatures name, and merging.

merged = fc.tree.merge({"params": params}, {"step": 7})
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_ckpt.arrays import AbstractArray, AbstractScalar, AbstractShardedArray, Scalar
from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.handlers import keypaths

__all__ = ["AbstractLeaf", "JsonType", "Leaf", "merge"]
__all__ += ["PyTree", "PyTreeKey", "PyTreeKeyPath", "PyTreeOf"]

T = TypeVar("T")

Leaf: TypeAlias = jax.Array | np.ndarray[Any, Any] | Scalar | str
AbstractLeaf: TypeAlias = AbstractArray | AbstractShardedArray | AbstractScalar | str | type[str]
JsonType: TypeAlias = list["JsonValue"] | dict[str, "JsonValue"]
JsonValue: TypeAlias = str | int | float | bool | JsonType | None

PyTree: TypeAlias = Any  # nested containers with any leaves; a leaf alone is one, too
PyTreeOf: TypeAlias = list[T] | Any  # with leaves of type `T`
if TYPE_CHECKING:  # jaxlib says nothing about the types of its keys
    PyTreeKey: TypeAlias = Any
else:
    PyTreeKey = SequenceKey | DictKey | GetAttrKey | FlattenedIndexKey
PyTreeKeyPath: TypeAlias = tuple[PyTreeKey, ...]


def merge(
    *trees: Any, overwrite: bool = False, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """One tree that has the leaves of all.

    Mappings and named tuples are merged by key, sequences of one length element by element, other
    nodes by the names of their children. None is a leaf.

    Args:
        *trees: not changed; parts of them are shared with the result.
        overwrite: whether of two leaves in one place the later wins, unless it is None, and of
            two types of nodes that of the later; else both are an error.
        is_leaf: what is a leaf; None: what JAX takes for one.

    Raises:
        TreeMismatchError: lists the places where the trees cannot be merged.

    >>> merge({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}})
    {'a': 1, 'b': {'c': 2, 'd': 3}}
    >>> merge({"a": 1}, {"a": 2}, overwrite=True)
    {'a': 2}
    """
    ends = is_leaf or _is_leaf
    wrong: list[str] = []

    def join(earlier: Any, later: Any, *path: Any) -> Any:
        where = "/".join(map(str, path)) or "(the whole tree)"
        kinds = type(earlier).__name__, type(later).__name__
        if ends(earlier) or ends(later):
            if not overwrite:
                wrong.append(f"{where}: in two trees, as {kinds[0]} and {kinds[1]}")
            return earlier if later is None else later
        if type(earlier) is not type(later) and not overwrite:
            wrong.append(f"{where}: nodes of two types, {kinds[0]} and {kinds[1]}")
            return later
        old, new, keyed = _children(earlier), _children(later), _is_keyed(later)
        if _is_keyed(earlier) != keyed or (not keyed and old.keys() != new.keys()):
            sizes = f"{kinds[0]} of {len(old)}, {kinds[1]} of {len(new)}"
            wrong.append(f"{where}: nodes that have not the same children: {sizes}")
            return later
        both = {key: join(old[key], new[key], *path, key) for key in old if key in new}
        return _rebuilt(later, old | new | both)

    result: Any = functools.reduce(join, trees) if trees else {}
    if wrong:
        raise TreeMismatchError("the trees cannot be merged:\n  " + "\n  ".join(wrong))
    return result


def _is_leaf(node: Any) -> bool:
    return node is None or jax.tree_util.all_leaves([node])


def _is_keyed(node: Any) -> bool:
    return isinstance(node, Mapping) or hasattr(node, "_asdict")


def _children(node: Any) -> dict[Any, Any]:
    if _is_keyed(node):
        return dict(node._asdict() if hasattr(node, "_asdict") else node)
    pairs, _ = keypaths.one_level(node)
    return {jax.tree_util.keystr(path, simple=True): child for path, child in pairs}


def _rebuilt(node: Any, children: dict[Any, Any]) -> Any:
    """A node of the type of `node`; a dict, if a named tuple has not all the fields."""
    if hasattr(node, "_asdict"):
        return type(node)(**children) if children.keys() == node._asdict().keys() else children
    if _is_keyed(node):
        return type(node)(children)
    _, treedef = keypaths.one_level(node)
    return treedef.unflatten([children[name] for name in _children(node)])
