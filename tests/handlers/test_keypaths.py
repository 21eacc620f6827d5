"""Our walk through a tree finds what JAX's own flattening with paths finds, in its order."""

import collections
import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_ckpt.format.tree import DICT, MAX_DEPTH, SEQUENCE, Key
from flax_ckpt.handlers import keypaths


class Point(NamedTuple):
    x: Any
    y: Any


@flax.struct.dataclass
class Box:
    inner: Any
    label: str = flax.struct.field(pytree_node=False, default="box")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Bag:
    """A node whose children have no names."""

    items: list[Any]

    def tree_flatten(self) -> tuple[list[Any], None]:
        return self.items, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Bag":
        return cls(list(children))


def of_jax(value: Any) -> tuple[list[tuple[Key, ...]], list[Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=keypaths.is_empty)
    return [tuple(map(key, path)) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def key(found: Any) -> Key:
    if isinstance(found, SequenceKey):
        return Key(str(found.idx), SEQUENCE)
    if isinstance(found, FlattenedIndexKey):
        return Key(str(found.key), SEQUENCE)
    if isinstance(found, DictKey):
        return Key(str(found.key), DICT)
    assert isinstance(found, GetAttrKey)
    return Key(found.name, DICT)


def nodes(children: Any) -> Any:
    keys = st.text(max_size=3)
    return st.one_of(
        st.dictionaries(keys, children, max_size=4),
        st.dictionaries(st.integers(-20, 20), children, max_size=4),
        st.dictionaries(keys, children, max_size=3).map(collections.OrderedDict),
        st.dictionaries(keys, children, max_size=3).map(
            lambda found: collections.defaultdict(list, found)
        ),
        st.lists(children, max_size=12),
        st.lists(children, max_size=3).map(tuple),
        st.lists(children, max_size=3).map(Bag),
        st.builds(Point, children, children),
        st.builds(Box, children),
    )


leaf = st.one_of(
    st.none(), st.integers(), st.text(max_size=2), st.just(np.ones(2)), st.just(optax.EmptyState())
)


@settings(max_examples=300, deadline=None)
@given(st.recursive(leaf, nodes, max_leaves=20))
def test_the_walk_agrees_with_jax(tree: Any) -> None:
    paths, leaves = keypaths.flatten(tree)
    expected_paths, expected, treedef = of_jax(tree)
    assert paths == expected_paths
    assert all(one is other for one, other in zip(leaves, expected, strict=True))
    assert keypaths.structure(tree) == treedef


def test_keys_of_several_types_are_refused_as_by_jax() -> None:
    with pytest.raises(ValueError, match="Comparator raised exception"):
        jax.tree.leaves({1: 0, "a": 0})
    with pytest.raises(ValueError, match="Comparator raised exception"):
        keypaths.flatten({"outer": {1: 0, "a": 0}})


def test_what_lies_too_deep_counts_as_a_leaf() -> None:
    tree: Any = {}
    for _ in range(5000):
        tree = {"a": tree}
    ((path,), (rest,)) = keypaths.flatten(tree)
    assert len(path) == MAX_DEPTH + 1
    assert isinstance(rest, dict)
