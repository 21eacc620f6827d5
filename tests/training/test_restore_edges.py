"""What a restore once got wrong, found by use."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx

import flax_ckpt as fc
from flax_ckpt.errors import StateError, TreeMismatchError

W = {"w": np.arange(3.0)}


def save(root: Path, state: Any) -> None:
    with fc.CheckpointCallback(root, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, state)


def test_one_options_object_that_is_changed_for_each_leaf(tmp_path: Path) -> None:
    options, context = fc.options.ArrayOptions.Saving.StorageOptions(), fc.Context()

    def create(path: Any, leaf: Any) -> Any:
        options.dtype = jnp.bfloat16 if "ema" in str(path) else None
        return options

    context.array.saving.scoped_storage_options_creator = create
    with context:
        fc.save(tmp_path / "a", {"a": jnp.full(3, 1.1), "ema": jnp.full(3, 1.1)})
    found: Any = fc.metadata(tmp_path / "a").metadata
    assert [found[name].dtype for name in ("a", "ema")] == [np.float32, jnp.bfloat16]


def test_a_renamed_leaf_wins_over_one_that_would_only_do(tmp_path: Path) -> None:
    boxed = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))  # `.value` in its paths
    average = jax.tree.map(lambda x: x * 0 + 7, nnx.to_pure_dict(boxed))
    v0.PyTreeCheckpointer().save(tmp_path / "a", {"params": boxed, "ema": average})
    like, rename = nnx.Linear(2, 2, rngs=nnx.Rngs(1)), {"ema": "params"}
    with pytest.raises(TreeMismatchError, match="params/bias/value: saved float32"):
        fc.restore(tmp_path / "a", like, rename=rename)
    out = fc.restore(tmp_path / "a", like, rename=rename, unexpected="ignore")
    np.testing.assert_array_equal(out.state.bias[...], [7, 7])
    assert ("ema/bias", "params/bias") in out.report.renamed


def test_keys_with_slashes_are_not_taken_for_paths(tmp_path: Path) -> None:
    state = {"params": {"a/b": np.ones(2), "a": {"b": np.full(2, 2.0)}}}
    save(tmp_path, state)
    found = fc.restore_train_state(tmp_path, state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict[str, Any]
    layers: int = dataclasses.field(metadata={"static": True}, default=0)
    apply: Any = dataclasses.field(metadata={"static": True}, default=print)


def test_static_fields_of_a_dataclass_of_jax_are_those_of_like(tmp_path: Path) -> None:
    save(tmp_path, State(W, 4))
    found = fc.restore_train_state(tmp_path, State(W, 6, len))
    assert (found.layers, found.apply) == (6, len)
    np.testing.assert_array_equal(found.params["w"], W["w"])


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (jnp.uint32(2**32 - 1), jnp.int32(0)),
        (np.int8(-1), np.uint8(0)),
        (np.uint64(2**63 + 5), np.int64(0)),
        (jnp.complex64(1 + 2j), jnp.float32(0)),
    ],
)
def test_a_number_that_does_not_fit_is_refused(tmp_path: Path, saved: Any, wanted: Any) -> None:
    save(tmp_path, {"params": W, "n": saved})
    with pytest.raises(TreeMismatchError, match=r"n: .*(does not fit|saved complex64)"):
        fc.restore_train_state(tmp_path, {"params": W, "n": wanted})


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        (jax.random.key(0), 3),
        (jnp.float32(0), jnp.bfloat16(1)),
        ("text", 3),
        (jnp.int32(0), jax.random.key(0)),
    ],
)
def test_init_has_to_make_leaves_of_the_wanted_kind(tmp_path: Path, wanted: Any, made: Any) -> None:
    save(tmp_path, {"params": W})
    like, init = {"params": W, "x": wanted}, lambda: {"params": W, "x": made}
    with pytest.raises(
        StateError, match=r"init\(\) does not make the wanted leaves: train_state/x"
    ):
        fc.restore(tmp_path, like, missing="init", init=init)


def test_what_init_makes_is_placed_as_asked(tmp_path: Path) -> None:
    save(tmp_path, {"params": W})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    wish = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    init = lambda: {"params": W, "x": jnp.ones(8)}  # noqa: E731
    out = fc.restore(tmp_path, {"params": W, "x": wish}, missing="init", init=init)
    assert out.state["x"].sharding == sharding


def test_an_nnx_state_without_params(tmp_path: Path) -> None:
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.full(3, 5.0)
    save(tmp_path, norm)
    like = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)
    np.testing.assert_array_equal(fc.restore(tmp_path, like).state["mean"][...], np.full(3, 5.0))


def test_half_of_a_split_is_named_as_that(tmp_path: Path) -> None:
    graph, params, _ = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, ...)
    with pytest.raises(StateError, match="not all of what nnx.split returned"):
        save(tmp_path, (graph, params))


def test_nothing_is_wanted_of_a_part_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, {"params": W})
    found = fc.restore_train_state(tmp_path, {"params": W, "ema": None, "batch_stats": {}})
    assert (found["ema"], found["batch_stats"]) == (None, {})


def test_the_result_has_the_structure_of_like(tmp_path: Path) -> None:
    save(tmp_path, {"params": W, "batch_stats": {}})
    assert (
        fc.restore_train_state(tmp_path, {"params": W, "batch_stats": None})["batch_stats"] is None
    )


def test_a_leaf_that_was_donated_is_not_kept(tmp_path: Path) -> None:
    save(tmp_path, {"params": W})
    like = {"params": W, "head": jnp.ones(3) + 1}
    like["head"].delete()
    with pytest.raises(
        StateError, match="abstract or deleted in the wanted state: train_state/head"
    ):
        fc.restore(tmp_path, like, only="params")


def test_selections_of_other_forms(tmp_path: Path) -> None:
    save(tmp_path, {"params": {"a": np.ones(1), "b": np.ones(1)}, "opt_state": {"mu": np.ones(1)}})
    like = {"params": {"a": np.zeros(1), "b": np.zeros(1)}}
    out = fc.restore(tmp_path, like, exclude="opt_state/mu")
    assert out.report.loaded == ("params/a", "params/b")
    out = fc.restore(tmp_path, like, only=(name for name in ["params/a"]))
    assert (out.report.loaded, out.report.kept) == (("params/a",), ("params/b",))


def test_a_prefix_is_renamed_to_nothing(tmp_path: Path) -> None:
    fc.save(tmp_path / "a", {"model": {"params": W}})
    out = fc.restore(tmp_path / "a", {"params": {"w": np.zeros(3)}}, rename={"model": ""})
    np.testing.assert_array_equal(out.state["params"]["w"], W["w"])


def test_a_dict_with_a_default_keeps_it(tmp_path: Path) -> None:
    state = collections.defaultdict(list, params=W)
    save(tmp_path, state)
    found = fc.restore_train_state(tmp_path, state)
    assert found["other"] == []
    np.testing.assert_array_equal(found["params"]["w"], W["w"])


def test_a_leaf_under_its_own_name_is_not_renamed(tmp_path: Path) -> None:
    save(tmp_path, {"params": [np.ones(1)]})
    assert fc.restore(tmp_path, {"params": {0: np.zeros(1)}}).report.renamed == ()
