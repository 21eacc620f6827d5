"""Our leaf handlers pass the suite for leaf handlers; those that break one rule each do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flax_ckpt.leaves.array import ArrayLeaf, KeyLeaf
from flax_ckpt.leaves.base import Target
from flax_ckpt.leaves.host import (
    NumpyLeaf,
    NumpyShapeDtype,
    ScalarLeaf,
    StringLeaf,
    host_write,
)
from flax_ckpt.storage.store import whole
from flax_ckpt.testing import LeafTests


class TestArrayLeaf(LeafTests):
    handler = ArrayLeaf

    def values(self) -> Sequence[Any]:
        return [jnp.arange(6.0).reshape(2, 3), jnp.zeros((0, 2)), jnp.bfloat16(1.5)]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [value, jax.Array, jax.ShapeDtypeStruct(value.shape, value.dtype), jax.typeof(value)]

    def misfits(self, value: Any) -> Sequence[Any]:
        return [jax.ShapeDtypeStruct((*value.shape, 1), value.dtype)]

    def refused(self) -> Sequence[Any]:
        return [np.ones(2), 1.0, jax.random.key(0)]

    def same(self, found: Any, saved: Any) -> bool:
        bits = np.asarray(found).tobytes() == np.asarray(saved).tobytes()
        return isinstance(found, jax.Array) and jax.typeof(found) == jax.typeof(saved) and bits


class TestKeyLeaf(LeafTests):
    handler = KeyLeaf

    def values(self) -> Sequence[Any]:
        return [jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 3)]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [value, jax.ShapeDtypeStruct(value.shape, value.dtype)]

    def misfits(self, value: Any) -> Sequence[Any]:
        other = jax.random.key(0, impl="unsafe_rbg").dtype
        return [
            jax.ShapeDtypeStruct((5, *value.shape), value.dtype),
            jax.ShapeDtypeStruct(value.shape, other),
        ]

    def refused(self) -> Sequence[Any]:
        return [jnp.ones(2), 1]

    def same(self, found: Any, saved: Any) -> bool:
        same = jax.random.key_data(found) == jax.random.key_data(saved)
        return found.dtype == saved.dtype and bool(same.all())


class TestNumpyLeaf(LeafTests):
    handler = NumpyLeaf

    def values(self) -> Sequence[Any]:
        return [
            np.arange(6).reshape(2, 3),
            np.ones((0, 2), ml_dtypes.bfloat16),
            np.asfortranarray(np.eye(3, dtype=">f4")),
        ]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [value, np.ndarray, NumpyShapeDtype(value.shape, value.dtype)]

    def misfits(self, value: Any) -> Sequence[Any]:
        return [np.ones((*value.shape, 1), value.dtype)]

    def refused(self) -> Sequence[Any]:
        return [jnp.ones(2), 1.0, np.array(["text"])]

    def change(self, value: Any) -> None:
        value += 1

    def same(self, found: Any, saved: Any) -> bool:
        return found.dtype == saved.dtype.newbyteorder("=") and bool(np.array_equal(found, saved))


class TestScalarLeaf(LeafTests):
    handler = ScalarLeaf

    def values(self) -> Sequence[Any]:
        return [0, -(2**63), 2**64 - 1, 0.1, True]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [value, type(value)]

    def refused(self) -> Sequence[Any]:
        return [2**64, np.float64(1), "1"]

    def same(self, found: Any, saved: Any) -> bool:
        return type(found) is type(saved) and found == saved


class TestStringLeaf(LeafTests):
    handler = StringLeaf

    def values(self) -> Sequence[Any]:
        return ["", "text", 'é\n"{}"']

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [str, value]

    def refused(self) -> Sequence[Any]:
        return [b"", 1]


# A leaf of a user's, which passes; each of the subclasses of its handler breaks one rule.


@dataclasses.dataclass
class Point:
    at: np.ndarray[Any, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and np.array_equal(other.at, self.at)


class PointLeaf:
    value_types: tuple[str, ...] = ("tests.Point",)

    def handles(self, value: Any) -> bool:
        return isinstance(value, Point)

    def handles_abstract(self, abstract: Any) -> bool:
        return abstract is Point or isinstance(abstract, Point)

    def write(self, value: Any, *, copy: bool) -> Any:
        return host_write("tests.Point", np.array(value.at, copy=copy))

    def describe(self, saved: Any) -> Any:
        return Point

    def target(self, saved: Any, abstract: Any, rules: Any) -> Any:
        sized = isinstance(abstract, Point)
        if saved.shape is None or (sized and saved.shape != abstract.at.shape):
            return f"a Point of {abstract.at.size}" if sized else "a Point"
        return Target(saved, (whole(saved.shape),), Point)

    def build(self, targets: Any, data: Any) -> list[Any]:
        return [Point(part) for (part,) in data]


class TestPointLeaf(LeafTests):
    handler: Any = PointLeaf

    def values(self) -> Sequence[Any]:
        return [Point(np.arange(2.0)), Point(np.ones(3, np.int8))]

    def abstracts(self, value: Any) -> Sequence[Any]:
        return [Point, value]

    def misfits(self, value: Any) -> Sequence[Any]:
        return [Point(np.zeros(9))]

    def change(self, value: Any) -> None:
        value.at[:] = 9


class Shapeless:
    value_types = PointLeaf.value_types
    handles, handles_abstract, write = (
        PointLeaf.handles,
        PointLeaf.handles_abstract,
        PointLeaf.write,
    )


class NotFoundAgain(PointLeaf):
    value_types = ("tests.Ponit",)


class Hollow(PointLeaf):
    value_types = ("tests.Point", "Dict")


class BuildsFromNothing(PointLeaf):
    def build(self, targets: Any, data: Any) -> list[Any]:
        return super().build(targets, data) or [Point(np.ones(2))]


class Greedy(PointLeaf):
    def handles(self, value: Any) -> bool:
        return True


class Choosy(PointLeaf):
    def handles(self, value: Any) -> bool:
        return False


class GreedyToLoad(PointLeaf):
    def handles_abstract(self, abstract: Any) -> bool:
        return True


class ChoosyToLoad(PointLeaf):
    def handles_abstract(self, abstract: Any) -> bool:
        return abstract is Point


class SharesMemory(PointLeaf):
    def write(self, value: Any, *, copy: bool) -> Any:
        return host_write("tests.Point", np.asarray(value.at))


class Lossy(PointLeaf):
    def build(self, targets: Any, data: Any) -> list[Any]:
        return [Point(part.astype(np.int8) + 1) for (part,) in data]


class BlindToTheWish(PointLeaf):
    def target(self, saved: Any, abstract: Any, rules: Any) -> Any:
        return Target(saved, (whole(saved.shape),), abstract)

    def build(self, targets: Any, data: Any) -> list[Any]:
        wished = [isinstance(target.abstract, Point) for target in targets]
        return [None if w else Point(part) for w, (part,) in zip(wished, data, strict=True)]


class DescribesAnother(PointLeaf):
    def describe(self, saved: Any) -> Any:
        return "a point"


class Shuffles(PointLeaf):
    def build(self, targets: Any, data: Any) -> list[Any]:
        return super().build(targets, data)[::-1]


class TakesAnything(PointLeaf):
    def target(self, saved: Any, abstract: Any, rules: Any) -> Any:
        return Target(saved, () if saved.shape is None else (whole(saved.shape),), Point)

    def build(self, targets: Any, data: Any) -> list[Any]:
        return [Point(part[0] if part else np.ones(1)) for part in data]


class Mumbles(PointLeaf):
    def target(self, saved: Any, abstract: Any, rules: Any) -> Any:
        found = super().target(saved, abstract, rules)
        return str(saved) if isinstance(found, str) else found


class TripsOverStrings(PointLeaf):
    def target(self, saved: Any, abstract: Any, rules: Any) -> Any:
        assert saved.shape is not None, "tripped over a string"
        return super().target(saved, abstract, rules)


BROKEN: list[tuple[Any, str, str]] = [
    (Shapeless, "it_is_a_leaf_handler", "lacks methods of LeafHandler"),
    (NotFoundAgain, "it_is_a_leaf_handler", "the kind 'tests.Point', which is not among"),
    (Hollow, "it_is_a_leaf_handler", "that of an empty node"),
    (BuildsFromNothing, "it_is_a_leaf_handler", "of no targets it builds"),
    (Greedy, "it_says_what_it_takes", "takes <object object"),
    (Choosy, "it_says_what_it_takes", "does not take Point"),
    (GreedyToLoad, "it_says_what_it_takes", "loads into <object object"),
    (ChoosyToLoad, "it_says_what_it_takes", "does not load into Point"),
    (SharesMemory, "a_leaf_may_change_once_it_is_written", "what was written changed with Point"),
    (Lossy, "a_leaf_alone_and_one_of_its_metadata", "loaded into None: saved .*, loaded"),
    (BlindToTheWish, "a_leaf_alone_and_one_of_its_metadata", r"into Point\(.*: .*loaded None"),
    (DescribesAnother, "a_leaf_alone_and_one_of_its_metadata", "'a point', which it does not take"),
    (Shuffles, "leaves_keep_their_places", "loaded among others: saved"),
    (
        TakesAnything,
        "what_does_not_fit_is_told_by_path_with_both_sides",
        "does not fit, but it was loaded",
    ),
    (Mumbles, "what_does_not_fit_is_told_by_path_with_both_sides", "says nothing of what differs"),
    (
        TripsOverStrings,
        "what_does_not_fit_is_told_by_path_with_both_sides",
        "tripped over a string",
    ),
]


@pytest.mark.parametrize(
    ("handler", "test", "message"), BROKEN, ids=[handler.__name__ for handler, *_ in BROKEN]
)
def test_a_leaf_handler_that_breaks_a_rule_fails(
    handler: Any, test: str, message: str, tmp_path: Path
) -> None:
    suite = type("Suite", (TestPointLeaf,), {"handler": handler})()
    run: Callable[..., None] = getattr(suite, f"test_{test}")
    arguments = [tmp_path][: run.__code__.co_argcount - 1]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=message):
        run(*arguments)


def test_every_test_of_the_suite_can_fail() -> None:
    tests = {name for name in dir(LeafTests) if name.startswith("test_")}
    assert {f"test_{test}" for _, test, _ in BROKEN} == tests
