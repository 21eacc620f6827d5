"""`tree.merge`: what Orbax merges, merged the same; what cannot be, an error that lists it all."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc


class Pair(NamedTuple):
    a: Any
    b: Any


@flax.struct.dataclass
class Node:
    a: Any = None
    b: Any = None


MERGED: list[tuple[Any, ...]] = [
    (),
    ({},),
    ({"a": 1},),
    ({"a": 1}, {"b": 2}),
    ({"b": 1}, {"a": 2}, {"c": {"d": 3}}),
    ({"a": {"x": 1}}, {"a": {"y": 1}}),
    ({"a": {}}, {"a": {"x": 1}}),
    ({"a": {"x": 1}}, {"a": {}}),
    ([{"a": 1}, {}], [{"b": 1}, {"c": 2}]),
    (Pair({"x": 1}, {}), Pair({"y": 1}, {"z": 2})),
    ({"n": Node({"x": 1}, {})}, {"n": Node({}, {"x": 2})}),
    (flax.core.freeze({"a": {"x": 1}}), flax.core.freeze({"a": {"y": 1}})),
    (OrderedDict(a={"x": 1}), OrderedDict(b=2)),
]
OVERWRITTEN: list[tuple[Any, ...]] = [
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"a": None}),
    ({"a": None}, {"a": 5}),
    ({"a": {"x": 1}}, {"a": 5}),
    ({"a": 5}, {"a": {"x": 1}}),
    ({"a": 5}, {"a": {}}),
    ([1, 2], [3, None]),
    ({"a": [1, 2]}, {"a": (None, 3)}),
    (Pair(1, 2), Pair(None, 3)),
    (Pair(1, 2), {"a": 3}),
    (Node(1, None), Node(3, None)),
    (Node(1, {"x": 1}), Node(None, {"y": 2})),
    (1, 2),
    ({"s": "ab"}, {"s": "cd"}),
]
REFUSED: list[tuple[tuple[Any, ...], str]] = [
    (({"a": 1, "b": 2}, {"a": 2, "b": 3}), "a: in two trees, as int and int\n  b: in two trees"),
    (({"a": None}, {"a": 5}), "a: in two trees, as NoneType and int"),
    (({"a": {"x": 1}}, {"a": 5}), "a: in two trees, as dict and int"),
    (({"a": [{}]}, {"a": ({},)}), "a: nodes of two types, list and tuple"),
    (
        ([{}], [{}, {}]),
        "(the whole tree): nodes that have not the same children: list of 1, list of 2",
    ),
    ((1, 2), "(the whole tree): in two trees, as int and int"),
]


@pytest.mark.parametrize("trees", MERGED, ids=str)
def test_trees_without_common_leaves(trees: tuple[Any, ...]) -> None:
    before = copy.deepcopy(trees)
    found = fc.tree.merge(*trees)
    assert found == ocp.tree.merge(*trees)
    assert type(found) is type(ocp.tree.merge(*trees))
    assert trees == before


@pytest.mark.parametrize("trees", OVERWRITTEN, ids=str)
def test_the_later_leaf_wins_if_told_so(trees: tuple[Any, ...]) -> None:
    found = fc.tree.merge(*trees, overwrite=True)
    assert found == ocp.tree.merge(*trees, overwrite=True)
    assert type(found) is type(ocp.tree.merge(*trees, overwrite=True))


@pytest.mark.parametrize(("trees", "message"), REFUSED, ids=str)
def test_what_cannot_be_merged_is_listed(trees: tuple[Any, ...], message: str) -> None:
    with pytest.raises(fc.errors.TreeMismatchError) as raised:
        fc.tree.merge(*trees)
    assert message in str(raised.value)
    with pytest.raises(ValueError, match="common key|not match"):
        ocp.tree.merge(*trees)


def test_nodes_that_have_not_the_same_children_are_an_error_even_then() -> None:
    with pytest.raises(ValueError, match="a: nodes that have not the same children: list of 1"):
        fc.tree.merge({"a": [1]}, {"a": {"x": 1}}, overwrite=True)


def test_the_caller_may_say_what_a_leaf_is() -> None:
    trees = {"a": {"x": 1, "y": 2}}, {"a": {"x": 3}}
    options: Any = {"overwrite": True, "is_leaf": lambda n: isinstance(n, int) or "x" in n}
    assert fc.tree.merge(*trees, **options) == {"a": {"x": 3}} == ocp.tree.merge(*trees, **options)


# Abstract forms of arrays.


def test_arrays_become_shape_and_dtype_as_in_orbax() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    values: list[Any] = [
        jax.device_put(np.ones((8, 2), np.float32), placed),
        jax.ShapeDtypeStruct((3,), np.int32, sharding=None),
        np.ones((2, 3)),
        jax.random.key(1),
        3,
        2.5,
        np.float32(3),
    ]
    for options in ({}, {"dtype": np.float16}, {"scalar_dtype": int}):
        for value in values:
            expected = ocp.arrays.to_shape_dtype_struct(value, **options)
            found = fc.arrays.to_shape_dtype_struct(value, **options)
            assert (found, type(found)) == (expected, type(expected))


# Processes.


async def _meet(**options: Any) -> None:
    await fc.multihost.sync_global_processes("here", operation_id="test", **options)


def test_one_process_waits_for_nobody() -> None:
    assert (fc.multihost.process_count(), fc.multihost.process_index()) == (1, 0)
    assert fc.multihost.is_primary_host(0)
    assert fc.multihost.is_primary_host(None)
    assert not fc.multihost.is_primary_host(1)
    asyncio.run(_meet())
    asyncio.run(_meet(processes=[0]))
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, got 0"):
        asyncio.run(_meet(timeout=0))
    with pytest.raises(ValueError, match=r"process 0 waits at 'here' for the processes \[1, 2\]"):
        asyncio.run(_meet(processes=[2, 1]))
