"""A PyTree as leaves by key path, empty nodes included, in the words of the on-disk format."""

from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_ckpt.format import tree

_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees
_CERTAIN_LEAVES = (jax.Array, np.ndarray, str, int, float, np.generic, jax.ShapeDtypeStruct)


def flatten(value: Any) -> tuple[list[tuple[tree.KeyPath, Any]], Any]:
    """Leaves and empty nodes by key path, and the treedef that takes as many values."""
    leaves, treedef = _tree_util.tree_flatten_with_path(value, is_leaf=is_empty)
    return [(tuple([_key(key) for key in path]), leaf) for path, leaf in leaves], treedef


def _key(key: Any) -> tuple[str, int]:
    if isinstance(key, DictKey):
        return str(key.key), tree.DICT
    if isinstance(key, GetAttrKey):
        return key.name, tree.DICT
    if isinstance(key, SequenceKey | FlattenedIndexKey):
        return str(key.idx if isinstance(key, SequenceKey) else key.key), tree.SEQUENCE
    return str(key), tree.DICT  # a key class of the user's own


def is_empty(node: Any) -> bool:
    """Whether a node of a tree is None or a container without children."""
    if node is None:
        return True
    if type(node) in (dict, list, tuple):
        return not node
    if isinstance(node, _CERTAIN_LEAVES):
        return False
    children = _tree_util.default_registry.flatten_one_level(node)
    return children is not None and not any(True for _ in children[0])


def empty_kind(node: Any) -> str:
    """How the format calls an empty node; all but the plain containers are `None` in it."""
    if isinstance(node, dict):
        return "Dict"
    if isinstance(node, list):
        return "List"
    return "Tuple" if type(node) is tuple else "None"
