"""PyTrees as checkpointables: what differs is told all at once, and Orbax's example runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
import flax_ckpt as ocp  # as in Orbax's documentation, the import swapped
from flax_ckpt.errors import (
    CheckpointNotFoundError,
    Difference,
    InvalidLayoutError,
    TreeMismatchError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


def struct(shape: tuple[int, ...], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_the_example_of_orbaxs_documentation(path: Path) -> None:
    state_pytree = {'weights': [1.0, 2.0], 'bias': 0.0}  # fmt: skip

    registry = ocp.handlers.local_registry()
    registry.add(
        ocp.handlers.PyTreeHandler, checkpointable_name='model_state'
    )  # fmt: skip
    ctx = ocp.Context()
    ctx.checkpointables.registry = registry
    with ctx:
        ocp.save_checkpointables(path, dict(model_state=state_pytree))  # noqa: C408

    with ctx:
        assert ocp.load_checkpointables(path) == {"model_state": state_pytree}
    assert ocp.load_checkpointables(path, {"model_state": state_pytree}) == {
        "model_state": state_pytree
    }
    assert (path / "model_state" / "_METADATA").exists()


# Differences.


def test_every_difference_is_told_in_one_error(path: Path) -> None:
    fc.save(
        path,
        {
            "shape": jnp.ones((3, 4)),
            "rank": jnp.ones(3),
            "kind": np.ones(2),
            "text": "x",
            "gone": jnp.ones(2),
            "nested": {"deep": [1, 2.5, True]},
            "empty": {},
            "list": [1, 2],
        },
    )
    wanted = {
        "shape": struct((4, 3)),
        "rank": struct(()),
        "kind": "a string",
        "text": struct((2,)),
        "nested": {"deep": [1, 2.5, True, struct((9,), np.int32)], "new": 0},
        "empty": {"child": 1},
        "list": {"0": 1, "1": 2},
    }
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(path, wanted)
    assert str(raised.value).splitlines() == [
        f"{path}/state does not fit the wanted tree, 12 differences:",
        "  empty/child: saved nothing, wanted a int",
        "  kind: saved float64[2] (numpy), wanted a string",
        "  list/0: saved nothing, wanted a int in a dict",
        "  list/1: saved nothing, wanted a int in a dict",
        "  nested/deep/3: saved nothing, wanted int32[9]",
        "  nested/new: saved nothing, wanted a int",
        "  rank: saved float32[3], wanted float32[]",
        "  shape: saved float32[3,4], wanted float32[4,3]",
        "  text: saved string, wanted float32[2]",
        "  gone: saved float32[2], wanted nothing",
        "  list/0: saved int64[] (Python scalar) in a list, wanted nothing",
        "  list/1: saved int64[] (Python scalar) in a list, wanted nothing",
    ]
    assert Difference("shape", "float32[3,4]", "float32[4,3]") in raised.value.differences
    assert isinstance(raised.value, ValueError)


def test_a_key_is_not_taken_for_an_array_of_another_dtype(path: Path) -> None:
    fc.save(path, {"key": jax.random.key(0)})
    with pytest.raises(
        TreeMismatchError, match=r"key: saved key<threefry2x32>\[\], wanted float32"
    ):
        fc.load(path, {"key": struct((2,))})
    with pytest.raises(TreeMismatchError, match=r"key: saved key<threefry2x32>\[\], wanted uint32"):
        fc.load(path, {"key": struct((3,), np.uint32)})


def test_the_text_of_a_small_mismatch(path: Path) -> None:
    fc.save(path, {"a": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, "n": 1})
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(path, {"a": {"w": struct((4, 3)), "c": struct((2,), np.int32)}, "n": "x"})
    assert str(raised.value) == (
        f"{path}/state does not fit the wanted tree, 4 differences:\n"
        "  a/c: saved nothing, wanted int32[2]\n"
        "  a/w: saved float32[3,4], wanted float32[4,3]\n"
        "  n: saved int64[] (Python scalar), wanted a string\n"
        "  a/b: saved float32[4], wanted nothing"
    )
    assert raised.value.differences == (
        Difference("a/c", "nothing", "int32[2]"),
        Difference("a/w", "float32[3,4]", "float32[4,3]"),
        Difference("n", "int64[] (Python scalar)", "a string"),
        Difference("a/b", "float32[4]", "nothing"),
    )


def test_a_long_list_of_differences_is_cut_in_the_text_alone(path: Path) -> None:
    fc.save(path, {f"{i:03}": np.ones(2) for i in range(100)})
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(path, {f"{i:03}": np.ones(3) for i in range(100)})
    lines = str(raised.value).splitlines()
    assert len(lines) == 42
    assert lines[-1] == "  … and 60 more, in `.differences`"
    assert len(raised.value.differences) == 100


def test_a_mismatch_is_found_before_any_data_is_read(path: Path) -> None:
    fc.save(path, {"a": jnp.ones(3), "b": jnp.ones(3)})
    (data,) = (path / "state" / "d").iterdir()
    whole = data.read_bytes()
    data.write_bytes(b"\xff" * 4 + whole[4:])  # `a` is damaged: reading it would be another error
    with pytest.raises(TreeMismatchError, match=r"b: saved float32\[3\], wanted float32\[4\]"):
        fc.load(path, {"a": struct((3,)), "b": struct((4,))})


def test_a_list_and_a_dict_with_the_same_keys_are_told_apart(path: Path) -> None:
    fc.save(path, {"x": [1, 2]})
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(path, {"x": {"0": 1, "1": 2}})
    text = str(raised.value)
    assert "in a list" in text
    assert "in a dict" in text


def test_tuples_lists_and_named_tuples_of_the_same_paths_load_into_each_other(path: Path) -> None:
    fc.save(path, {"x": [1, 2]})
    assert fc.load(path, {"x": (0, 0)}) == {"x": (1, 2)}


def test_missing_wholly_and_unexpected_parts(path: Path) -> None:
    fc.save(path, {"a": 1})
    with pytest.raises(TreeMismatchError, match="2 differences"):
        fc.load(path, {"b": 1})
    with pytest.raises(TreeMismatchError, match=r"\(the whole tree\)"):
        fc.load(path, 1)


# Partial loads, names, paths.


def test_partial_load_leaves_the_rest_alone(path: Path) -> None:
    fc.save(path, {"a": 1, "b": {"c": 2, "d": 3}})
    context = fc.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert fc.load(path, {"b": {"d": 0}}) == {"b": {"d": 3}}
        with pytest.raises(TreeMismatchError, match="e: saved nothing"):
            fc.load(path, {"b": {"e": 0}})
    with pytest.raises(TreeMismatchError, match="a: saved int64"):
        fc.load(path, {"b": {"d": 0}})


def test_none_in_an_abstract_tree_means_as_it_was_saved(path: Path) -> None:
    fc.save(path, {"a": 1, "b": np.ones(2), "c": None, "d": {}})
    loaded = fc.load(path, {"a": None, "b": None, "c": None, "d": None})
    assert (loaded["a"], loaded["c"], loaded["d"]) == (1, None, {})
    assert type(loaded["b"]) is np.ndarray


def test_metadata_is_an_abstract_tree_that_loads_as_saved(path: Path) -> None:
    tree = {"j": jnp.ones(2), "n": np.ones(3), "i": 1, "f": 2.5, "b": True, "s": "x", "e": [{}]}
    fc.save(path, tree, custom_metadata={"run": [1, None, "x"]})
    found = fc.metadata(path)
    assert found.custom_metadata == {"run": [1, None, "x"]}
    assert str(found.path) == str(path)
    assert found.init_timestamp_nsecs < found.commit_timestamp_nsecs
    assert (found.metadata["i"], found.metadata["f"], found.metadata["b"]) == (0, 0.0, False)
    for abstract in (found, found.metadata):
        loaded = fc.load(path, abstract)
        assert jax.tree.map(type, loaded) == jax.tree.map(type, tree)
        assert (loaded["i"], loaded["f"], loaded["b"], loaded["s"]) == (1, 2.5, True, "x")
    all_of_it = fc.checkpointables_metadata(path)
    assert fc.load_checkpointables(path, all_of_it)["state"]["i"] == 1


def test_the_name_of_the_checkpointable(path: Path) -> None:
    fc.save(path, {"a": 1}, checkpointable_name="params")
    assert fc.load(path) == {"a": 1}
    assert fc.load(path, checkpointable_name="params") == {"a": 1}
    with pytest.raises(CheckpointNotFoundError, match="no checkpointable 'state'; it has: params"):
        fc.load(path, checkpointable_name="state")


def test_several_trees_and_no_state_are_not_guessed(path: Path) -> None:
    fc.save_checkpointables(path, {"params": {"a": 1}, "ema": {"a": 2}})
    with pytest.raises(InvalidLayoutError, match="several PyTrees: ema, params"):
        fc.load(path)
    assert fc.load_checkpointables(path) == {"params": {"a": 1}, "ema": {"a": 2}}
    assert fc.load_checkpointables(path, {"ema": None}) == {"ema": {"a": 2}}


@pytest.mark.parametrize(
    "name", ["metrics", "AUTO", "", "a/b", "..", ".", "x.orbax-checkpoint-tmp"]
)
def test_names_that_cannot_be_used(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        fc.save(path, {"a": 1}, checkpointable_name=name)
    assert not path.parent.joinpath("ckpt").exists()


def test_relative_paths_paths_with_a_slash_and_path_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, target in enumerate(["a", "./b/", Path("c"), "~/d", "e/../f", "g//h"]):
        fc.save(target, {"n": number})
        assert fc.load(target) == {"n": number}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d", "f", "g"]


def test_the_directory_of_save_async_is_that_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    response = fc.save_async("here", {"n": 1})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    response.result()
    assert fc.load(tmp_path / "here") == {"n": 1}


def test_a_path_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    fc.save(tmp_path / "run" / "100", {"a": 1})
    with pytest.raises(CheckpointNotFoundError, match=f"{tmp_path}/run has: 100"):
        fc.load(tmp_path / "run" / "200")
    with pytest.raises(InvalidLayoutError, match="its steps: 100"):
        fc.load(tmp_path / "run")


def test_the_validator_sees_every_process_when_saving_and_loading(path: Path) -> None:
    seen: list[Any] = []

    class Validator(fc.handlers.ArrayMetadataValidator):
        def validate_all_array_metadatas(self, array_metadatas: Any) -> None:
            seen.append({n: [a.name for a in found] for n, found in array_metadatas.items()})

    class Handler:
        """A handler with arguments is wrapped in one without."""

        def __new__(cls) -> Any:
            return fc.handlers.PyTreeHandler(array_metadata_validator=Validator())

    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Handler, checkpointable_name="tree"
    )
    with context:
        fc.save_checkpointables(path, {"tree": {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}}})
        fc.load_checkpointables(path)
    assert seen == [{0: ["a", "b.c"]}] * 2


def test_an_explicit_context_of_a_handler_beats_the_active_one(path: Path) -> None:
    explicit, ambient = fc.Context(), fc.Context()
    explicit.pytree.loading.partial_load = True

    class Handler:
        def __new__(cls) -> Any:
            return fc.handlers.PyTreeHandler(context=explicit)

    ambient.checkpointables.registry = fc.handlers.local_registry().add(
        Handler, checkpointable_name="tree"
    )
    with ambient:
        fc.save_checkpointables(path, {"tree": {"a": 1, "b": 2}})
        assert fc.load_checkpointables(path, {"tree": {"a": 0}}) == {"tree": {"a": 1}}
