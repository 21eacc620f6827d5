"""A PyTree as leaves by key path, empty nodes included, in the words of the on-disk format."""

from typing import Any, cast

import jax
from jax.tree_util import FlattenedIndexKey, SequenceKey

from flax_ckpt.format.tree import DICT, MAX_DEPTH, SEQUENCE, Key, KeyPath

_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees
_flatten_one_level = _tree_util.default_registry.flatten_one_level


def flatten(value: Any) -> tuple[list[KeyPath], list[Any]]:
    """Key paths of leaves and empty nodes, and these, in the order of JAX's own flattening.

    What lies deeper than the format goes counts as a leaf.
    """
    paths: list[KeyPath] = []
    leaves: list[Any] = []
    _walk(value, (), paths, leaves, set())
    return paths, leaves


def _walk(
    node: Any, path: KeyPath, paths: list[KeyPath], leaves: list[Any], leaf_types: set[type]
) -> None:
    # JAX's own flattening with paths takes four times as long: it makes a key object, and calls
    # back for each node to learn that it is not empty.
    children = [] if len(path) > MAX_DEPTH else _children(node)
    if not children:
        paths.append(path)
        leaves.append(node)
        if children is None:
            leaf_types.add(cast("type[Any]", type(node)))
        return
    for key, child in children:
        inner = (*path, key)
        if type(child) in leaf_types:
            paths.append(inner)
            leaves.append(child)
        else:
            _walk(child, inner, paths, leaves, leaf_types)


def _children(node: Any) -> list[tuple[Key, Any]] | None:
    """The children of a node by their keys; None for a leaf."""
    kind = cast("type[Any]", type(node))
    if kind is dict:
        try:
            return [(Key(str(key), DICT), node[key]) for key in sorted(node)]
        except TypeError:
            pass  # keys of several types: JAX says whether and how it orders them
    if kind is list or kind is tuple:
        return [(Key(str(i), SEQUENCE), child) for i, child in enumerate(node)]
    if _flatten_one_level(node) is None:
        return None
    return [(_key(path[0]), child) for path, child in one_level(node)[0]]


def one_level(node: Any) -> Any:
    """The children of a node with JAX's paths of one key each, and its treedef."""

    def is_child(other: Any) -> bool:
        return other is not node

    return _tree_util.tree_flatten_with_path(node, is_leaf=is_child)


def _key(key: Any) -> Key:
    in_order = isinstance(key, SequenceKey | FlattenedIndexKey)
    return Key(jax.tree_util.keystr((key,), simple=True), SEQUENCE if in_order else DICT)


def structure(value: Any) -> Any:
    """The treedef that takes a value for each that :func:`flatten` finds, in its order."""
    return _tree_util.tree_structure(value, is_leaf=is_empty)


def is_empty(node: Any) -> bool:
    """Whether a node of a tree is None or a container without children."""
    if type(node) in (dict, list, tuple):
        return not node
    children = _flatten_one_level(node)
    return children is not None and not list(children[0])


def empty_kind(node: Any) -> str:
    """How the format calls an empty node; all but the plain containers are `None` in it."""
    if type(node) is tuple:
        return "Tuple"
    return "Dict" if isinstance(node, dict) else "List" if isinstance(node, list) else "None"
