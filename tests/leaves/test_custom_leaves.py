"""A leaf handler of a user's: saved, loaded, restored, described, and missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt import leaves


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float


class PointLeaf:
    """A kind of its own, so that it is found again without being asked for."""

    value_types = ("tests.Point",)

    def handles(self, value: Any) -> bool:
        return isinstance(value, Point)

    def handles_abstract(self, abstract: Any) -> bool:
        return abstract is Point or isinstance(abstract, Point)

    def write(self, value: Any, *, copy: bool) -> leaves.LeafWrite:
        return leaves.host_write("tests.Point", np.array([value.x, value.y]))

    def describe(self, saved: leaves.SavedLeaf) -> Any:
        return Point

    def target(
        self, saved: leaves.SavedLeaf, abstract: Any, rules: leaves.LoadRules
    ) -> leaves.Target | str:
        if saved.shape != (2,):
            return "a Point"
        return leaves.Target(saved, (leaves.whole((2,)),), Point)

    def build(self, targets: Any, data: Any) -> list[Any]:
        return [Point(*part.tolist()) for (part,) in data]


class Quantised:
    """An array in 8 bits: in memory a number of any dtype for each step."""

    def __init__(self, steps: Any, scale: float) -> None:
        self.steps, self.scale = steps, scale


class QuantisedLeaf:
    """Stored as the float array that it stands for: every reader has a use for it."""

    value_types = ()
    arrays = leaves.ArrayLeaf()

    def handles(self, value: Any) -> bool:
        return isinstance(value, Quantised)

    def handles_abstract(self, abstract: Any) -> bool:
        return isinstance(abstract, Quantised)

    def write(self, value: Any, *, copy: bool) -> leaves.LeafWrite:
        return self.arrays.write(value.steps * jnp.float32(value.scale), copy=copy)

    def describe(self, saved: leaves.SavedLeaf) -> Any:
        return self.arrays.describe(saved)

    def target(
        self, saved: leaves.SavedLeaf, abstract: Any, rules: leaves.LoadRules
    ) -> leaves.Target | str:
        wish = jax.ShapeDtypeStruct(abstract.steps.shape, jnp.float32)
        found = self.arrays.target(saved, wish, rules)
        if isinstance(found, str):
            return f"Quantised, {found}"
        return found.replace(abstract=(found.abstract, abstract.scale))

    def build(self, targets: Any, data: Any) -> list[Any]:
        plain = [target.replace(abstract=target.abstract[0]) for target in targets]
        scales = [target.abstract[1] for target in targets]
        return [
            Quantised((array / scale).round().astype(jnp.int8), scale)
            for array, scale in zip(self.arrays.build(plain, data), scales, strict=True)
        ]


class Trees(fc.handlers.PyTreeHandler):
    def __init__(self) -> None:
        registry = leaves.LeafRegistry(PointLeaf(), QuantisedLeaf())
        super().__init__(leaf_handler_registry=registry)


def with_points(name: str | None = None) -> fc.Context:
    context = fc.Context()
    registry = fc.handlers.local_registry().add(Trees, checkpointable_name=name)
    context.checkpointables.registry = registry
    return context


STATE = {"a": Point(1, 0.5), "inner": [Point(-1, 2), np.arange(3)], "n": 7}


def same(found: Any, expected: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(np.array_equal, found, expected)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


@pytest.mark.parametrize("name", [None, "state"])
def test_a_leaf_of_ones_own_type_comes_back(path: Path, name: str | None) -> None:
    with with_points(name):
        fc.save(path, STATE)
        assert same(fc.load(path), STATE)
        assert same(fc.load(path, {"a": Point, "inner": [STATE["a"], np.ndarray], "n": int}), STATE)
        described = fc.metadata(path).metadata
        assert described["inner"][0] is Point
        assert same(fc.load(path, fc.metadata(path)), STATE)


def test_a_type_that_is_stored_as_an_array_is_one_to_other_readers(path: Path) -> None:
    value = Quantised(jnp.array([[1, -2, 3]], jnp.int8), 0.5)
    with with_points():
        fc.save(path, {"w": value})
        found = fc.load(path, {"w": value})["w"]
    assert (found.steps.dtype, found.steps.tolist(), found.scale) == (
        jnp.int8,
        [[1, -2, 3]],
        0.5,
    )
    assert fc.load(path)["w"].tolist() == [[0.5, -1.0, 1.5]]
    assert ocp.load(path, {"w": jnp.zeros((1, 3))})["w"].tolist() == [[0.5, -1.0, 1.5]]
    wrong = Quantised(jnp.zeros(3, jnp.int8), 0.5)
    text = r"w: saved float32\[1,3\], wanted Quantised, float32\[3\]"
    with with_points(), pytest.raises(fc.errors.TreeMismatchError, match=text):
        fc.load(path, {"w": wrong})


@pytest.mark.parametrize("name", [None, "params"])
def test_a_training_run_saves_and_resumes_it(tmp_path: Path, name: str | None) -> None:
    state = {"params": {"at": Point(1, 2), "w": jnp.ones(2)}, "step": 1}
    context = with_points(name)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, context=context) as ckpt:
        ckpt.on_step_end(1, state)
    found = fc.restore_train_state(tmp_path, state, context=context)
    assert found["params"]["at"] == Point(1, 2)
    with context:
        assert fc.restore(tmp_path).state["params"]["at"] == Point(1, 2)
    with pytest.raises(
        fc.errors.TreeMismatchError,
        match=r"params/at: saved int64\[2\] \(tests.Point\), wanted a Point",
    ):
        fc.restore_train_state(tmp_path, state)


def test_without_its_handler_each_leaf_is_named_with_what_to_do(path: Path) -> None:
    with with_points():
        fc.save(path, {**STATE, **{f"p{i}": Point(i, i) for i in range(9)}})
    for read in (fc.load, fc.metadata):
        with pytest.raises(fc.errors.FormatError) as raised:
            read(path)
        lines = str(raised.value).splitlines()
        assert lines[0].endswith("state: no leaf handler is registered for 11 of its leaves:")
        assert lines[1:3] == ["  a: kind 'tests.Point'", "  inner/0: kind 'tests.Point'"]
        assert lines[-2] == "  … and 1 more"
        assert (
            "Load it with PyTreeHandler(leaf_handler_registry=LeafRegistry(handler))" in lines[-1]
        )


def test_without_its_handler_the_other_leaves_and_its_array_can_be_read(path: Path) -> None:
    with with_points():
        fc.save(path, STATE)
    wish = {"a": np.ndarray, "inner": [np.ndarray, np.ndarray], "n": int}
    assert fc.load(path, wish)["a"].tolist() == [1, 0.5]
    with pytest.raises(fc.errors.TreeMismatchError) as raised:
        fc.load(path, {**wish, "a": np.ones(3)})
    assert "a: saved float64[2] (tests.Point), wanted float64[3]" in str(raised.value)
    context = fc.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert fc.load(path, {"n": int}) == {"n": 7}


def test_orbax_reads_the_other_leaves(path: Path) -> None:
    with with_points():
        fc.save(path, STATE)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert ocp.load(path, {"n": 0}) == {"n": 7}
        assert ocp.load(path, {"a": np.ones(2)})["a"].tolist() == [1, 0.5]


def test_a_value_without_a_handler_says_where_to_look(path: Path) -> None:
    with pytest.raises(
        fc.errors.UnsupportedLeafError, match=r"a: a .*Point cannot (?s:.*)leaves say"
    ):
        fc.save(path, STATE)


def test_the_last_of_several_handlers_wins(path: Path) -> None:
    class Mirrored(PointLeaf):
        def build(self, targets: Any, data: Any) -> list[Any]:
            return [Point(p.y, p.x) for p in super().build(targets, data)]

    registry = leaves.LeafRegistry(PointLeaf(), Mirrored())
    assert isinstance(registry.for_value(Point(1, 2)), Mirrored)
    registry.add(PointLeaf())
    assert type(registry.for_value(Point(1, 2))) is PointLeaf
