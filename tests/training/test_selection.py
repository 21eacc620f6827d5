"""Restoring a part of a state, under other names, or into a state that has more or less."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import flax_ckpt as fc
from flax_ckpt.training.selection import Selection
from tests.training.states import assert_same, create, train


def save(root: Path, *states: Any) -> None:
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None) as ckpt:
        for step, state in enumerate(states, 1):
            ckpt.on_step_end(step, state)


def full(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def model(encoder: float, head: float, *, classes: int = 3) -> Any:
    """A state with an encoder of two layers and a head."""
    layers = {name: {"kernel": full(encoder, 2, 2)} for name in ("Dense_0", "Dense_1")}
    head_params = {"kernel": full(head, 2, classes), "bias": full(head, classes)}
    return {"params": {"encoder": layers, "head": head_params}, "step": 1}


# Which leaves.


def test_an_encoder_goes_into_a_new_model_with_a_new_head(tmp_path: Path):
    save(tmp_path, model(1, 2))
    like = model(0, 0, classes=5)
    out = fc.restore(tmp_path, like, only="params/encoder/**")
    assert_same(out.state["params"]["encoder"], model(1, 2)["params"]["encoder"])
    assert_same(out.state["params"]["head"], like["params"]["head"])
    assert out.report.loaded == tuple(f"params/encoder/Dense_{i}/kernel" for i in (0, 1))
    assert out.report.kept == ("params/head/bias", "params/head/kernel", "train_state/step")
    assert_same(like, model(0, 0, classes=5))


@pytest.mark.parametrize(
    ("only", "exclude"),
    [
        ("params/encoder", None),
        ("params/encoder/**", None),
        ("params/enc*", None),
        ("**/Dense_*", None),
        ("params/*/Dense_*/kernel", None),
        (["params/encoder/Dense_0", "params/encoder/Dense_1"], None),
        (lambda path: "encoder" in path, None),
        (None, ["params/head", "train_state"]),
        ("params", "params/head/**"),
        ("params", ["**/bias", lambda path: path == "params/head/kernel"]),
    ],
)
def test_names_globs_predicates_and_sequences_of_them(tmp_path: Path, only: Any, exclude: Any):
    save(tmp_path, model(1, 2))
    out = fc.restore(tmp_path, model(0, 0, classes=5), only=only, exclude=exclude)
    assert out.report.loaded == tuple(f"params/encoder/Dense_{i}/kernel" for i in (0, 1))


@pytest.mark.parametrize(
    ("glob", "fits", "not_"),
    [
        ("params", ["params", "params/a", "params/a/b"], ["params2", "x/params"]),
        ("params/", ["params/a"], ["params2"]),
        ("params/*/b", ["params/a/b", "params/a/b/c"], ["params/b", "params/a/c/b"]),
        ("params/**/b", ["params/b", "params/a/b", "params/a/c/b/d"], ["b", "params/a/bb"]),
        ("**/b", ["b", "a/b", "a/c/b"], ["ab", "a/bc"]),
        ("a/*_1", ["a/b_1", "a/_1/c"], ["a/b_12", "a/b/c_1"]),
        ("a.b/(c)", ["a.b/(c)"], ["axb/(c)", "a.b/c"]),
    ],
)
def test_what_a_glob_fits(glob: str, fits: list[str], not_: list[str]):
    assert all(Selection(only=glob).picks(fits))
    assert not any(Selection(only=glob).picks(not_))
    assert not any(Selection(exclude=glob).picks(fits))


def test_only_the_bytes_of_selected_leaves_are_read(tmp_path: Path):
    save(tmp_path, model(1, 2))
    damage(tmp_path / "1" / "params", full(2, 2, 3))
    with pytest.raises(fc.errors.DamagedCheckpointError, match="head/kernel: damaged"):
        fc.restore(tmp_path, model(0, 0), step=1)
    out = fc.restore(tmp_path, model(0, 0), step=1, only=["params/encoder", "params/head/bias"])
    assert_same(out.state["params"]["encoder"], model(1, 2)["params"]["encoder"])
    assert fc.restore(tmp_path, step=1, exclude="params/head/kernel").report.nbytes > 0


def damage(tree: Path, values: np.ndarray) -> None:
    """Changes a bit in the data of the leaf that has these values."""
    (file,) = (tree / "d").iterdir()
    data = bytearray(file.read_bytes())
    assert data.count(values.tobytes()) == 1
    data[data.index(values.tobytes())] ^= 1
    file.write_bytes(data)


def test_parts_of_which_nothing_is_selected_are_not_looked_into(tmp_path: Path):
    state = train(create(), 0, 1)
    save(tmp_path, state)
    for file in (tmp_path / "1" / "opt_state").rglob("*"):
        if file.is_file():
            file.unlink()
    out = fc.restore(tmp_path, create(), step=1, exclude="opt_state")
    assert_same(out.state.params, state.params)
    assert_same(out.state.opt_state, create().opt_state)


def test_without_a_target_the_selected_leaves_come_in_dicts_and_lists(tmp_path: Path):
    save(tmp_path, {"params": {"layers": [full(i, 2) for i in range(3)], "b": 1.0}, "step": 1})
    assert fc.restore(tmp_path, only="params/b").state == {"params": {"b": 1.0}}
    layers = fc.restore(tmp_path, only="**/layers").state["params"]["layers"]
    assert_same(layers, [full(i, 2) for i in range(3)])
    layers = fc.restore(tmp_path, exclude="**/layers/1").state["params"]["layers"]
    assert_same(layers, {"0": full(0, 2), "2": full(2, 2)})


def test_a_leaf_that_is_not_read_must_be_concrete(tmp_path: Path):
    save(tmp_path, model(1, 2))
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, model(0, 0)))
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore(tmp_path, like, only="params/encoder")
    assert str(caught.value) == (
        "these leaves are not read, and are abstract or deleted in the wanted state:"
        " params/head/bias, params/head/kernel, train_state/step. Give a concrete state, or init=,"
        " a function that makes one"
    )
    with pytest.raises(fc.errors.StateError, match="deleted in the wanted state: train_state/n"):
        fc.restore(tmp_path, like | {"n": np.ndarray}, missing="keep")


def test_init_makes_what_is_not_read_and_is_abstract(tmp_path: Path):
    save(tmp_path, model(1, 2))

    def init() -> Any:
        return jax.tree.map(jnp.asarray, model(7, 8, classes=5))

    out = fc.restore(tmp_path, jax.eval_shape(init), only="params/encoder", init=init)
    assert out.report.initialised == ("params/head/bias", "params/head/kernel", "train_state/step")
    np.testing.assert_array_equal(out.state["params"]["head"]["bias"], full(8, 5))
    np.testing.assert_array_equal(
        out.state["params"]["encoder"]["Dense_0"]["kernel"], full(1, 2, 2)
    )


@pytest.mark.parametrize("option", ["only", "exclude"])
def test_a_glob_that_fits_nothing_names_what_is_near(tmp_path: Path, option: str):
    save(tmp_path, model(1, 2))
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore(tmp_path, model(0, 0), **{option: ["params/encodr/**", "params/head"]})
    message = f"{option}='params/encodr/**' fits no leaf of {tmp_path}/1; nearest: params/encoder"
    assert str(caught.value).startswith(message)


def test_a_glob_unlike_anything_names_what_there_is(tmp_path: Path):
    save(tmp_path, model(1, 2))
    with pytest.raises(fc.errors.StateError, match="'x' fits no .*; nearest: params, train_state"):
        fc.restore(tmp_path, model(0, 0), only="x")


@pytest.mark.parametrize(
    "options",
    [{"only": []}, {"only": lambda path: False}, {"exclude": "**"}],
    ids=["none", "no", "all"],
)
def test_an_empty_selection_is_an_error(tmp_path: Path, options: Any):
    save(tmp_path, model(1, 2))
    for like in (model(0, 0), None):
        with pytest.raises(fc.errors.StateError, match="only= and exclude= select no leaf of .*/1"):
            fc.restore(tmp_path, like, **options)


def test_a_collection_that_only_leaves_out_is_named_in_a_warning(tmp_path: Path, caplog: Any):
    save(tmp_path, train(create(), 0, 1))
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        fc.restore(tmp_path, create(), only="params")
    assert [record.getMessage() for record in caplog.records] == [
        "only= selects nothing of train_state/batch_stats: what was read may need what was saved"
        " with it there; if so, name it in only= as well"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        fc.restore(tmp_path, create(), only=["params", "train_state/batch_stats"])
        fc.restore(tmp_path, create().params, only="params/Dense_0")
        fc.restore(tmp_path, create(), exclude="train_state/batch_stats")
    assert not caplog.records


# Under other names.


def test_frozen_base_weights_go_under_the_adapters_of_lora(tmp_path: Path):
    save(tmp_path, {"params": {"Dense_0": {"kernel": full(1, 2, 2)}}, "step": 3})
    adapters = {"a": full(5, 2, 1), "b": full(0, 1, 2)}
    like = {"params": {"base": {"Dense_0": {"kernel": full(0, 2, 2)}}, "lora": adapters}}
    out = fc.restore(tmp_path, like, rename={"params": "params/base"}, exclude="params/lora")
    assert out.state["params"]["base"]["Dense_0"]["kernel"].tolist() == full(1, 2, 2).tolist()
    assert_same(out.state["params"]["lora"], adapters)
    assert out.report.renamed == (("params/Dense_0/kernel", "params/base/Dense_0/kernel"),)


class EmaState(train_state.TrainState):
    ema_params: Any


def ema_state(params: float, ema: float) -> EmaState:
    tx = optax.adam(1e-3)
    values, averages = ({"w": jnp.full(2, value)} for value in (params, ema))
    return EmaState.create(apply_fn=jnp.sin, params=values, tx=tx, ema_params=averages)


def test_ema_params_go_into_params(tmp_path: Path):
    save(tmp_path, ema_state(1.0, 2.0))
    rename = {"train_state/ema_params": "params", "params": "train_state/ema_params"}
    state = fc.restore_train_state(tmp_path, ema_state(0.0, 0.0), rename=rename)
    assert (state.params["w"].tolist(), state.ema_params["w"].tolist()) == ([2, 2], [1, 1])
    rename = {"train_state/ema_params": "params", "params": "unused"}
    out = fc.restore(tmp_path, {"params": {"w": jnp.zeros(2)}}, rename=rename)
    assert out.state["params"]["w"].tolist() == [2, 2]
    assert "params/w" in out.report.ignored
    params = fc.restore_train_state(tmp_path, {"w": jnp.zeros(2)}, rename=rename)
    assert params["w"].tolist() == [2, 2]


def test_two_leaves_in_one_place_are_an_error_that_names_both(tmp_path: Path):
    save(tmp_path, ema_state(1.0, 2.0))
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore(tmp_path, ema_state(0.0, 0.0), rename={"train_state/ema_params": "params"})
    assert str(caught.value) == (
        "rename={'train_state/ema_params': 'params'} puts two saved leaves into one place:"
        " params/w and train_state/ema_params/w would both be params/w. Rename the other, too, to a"
        " name that is not wanted"
    )


def test_patterns_are_replaced_one_after_the_other(tmp_path: Path):
    save(tmp_path, {"params": {"layers_0": {"w": full(1, 2)}, "layers_1": {"w": full(2, 3)}}})
    like = {"params": {"layers": [{"weight": full(0, 2)}, {"weight": full(0, 3)}]}}
    rename = [(r"layers_(\d+)", r"layers/\1"), (r"/w$", "/weight")]
    out = fc.restore(tmp_path, like, rename=rename)
    assert_same(out.state, {"params": {"layers": [{"weight": full(1, 2)}, {"weight": full(2, 3)}]}})
    assert out.report.renamed[0] == ("params/layers_0/w", "params/layers/0/weight")


def test_linen_params_go_into_the_paths_of_an_nnx_module(tmp_path: Path):
    save(tmp_path, {"params": {"Dense_0": {"kernel": full(1, 2, 2), "bias": full(2, 2)}}})
    like = {"params": {"layers": {"0": {"kernel": full(0, 2, 2), "bias": full(0, 2)}}}}
    state = fc.restore_train_state(tmp_path, like, rename=[(r"Dense_(\d+)", r"layers/\1")])
    assert state["params"]["layers"]["0"]["bias"].tolist() == [2, 2]


def test_the_longest_prefix_counts_and_is_applied_once(tmp_path: Path):
    save(tmp_path, {"params": {"a": {"x": full(1, 1), "y": full(2, 1)}, "b": full(3, 1)}})
    like = {"params": {"b": {"x": full(0, 1)}, "a": full(0, 1), "z": full(0, 1)}}
    rename = {"params/a": "params/b", "params/b": "params/a", "params/a/y/": "/params/z"}
    state = fc.restore_train_state(tmp_path, like, rename=rename)
    assert_same(state, {"params": {"b": {"x": full(1, 1)}, "a": full(3, 1), "z": full(2, 1)}})


@pytest.mark.parametrize(
    ("rename", "what"),
    [
        ({"params/encodr": "params/x"}, "the prefix 'params/encodr' of rename="),
        ([("params/encodr", "params/x")], "the pattern 'params/encodr' of rename="),
    ],
    ids=["prefix", "pattern"],
)
def test_a_renaming_that_fits_nothing_names_what_is_near(tmp_path: Path, rename: Any, what: str):
    save(tmp_path, model(1, 2))
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore(tmp_path, model(0, 0), rename=rename)
    assert (
        str(caught.value)
        == f"{what} fits no leaf of {tmp_path}/1; nearest: params/encoder, params/head"
    )


# More or less.


def test_missing_leaves_are_an_error_that_lists_all(tmp_path: Path):
    save(tmp_path, {"params": {"w": full(1, 2)}, "step": 1})
    like = {"params": {"w": full(0, 2), "a": full(0, 2), "b": full(0, 3)}, "step": 0}
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore(tmp_path, like)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/1 does not fit the wanted tree, 2 differences:",
        "  params/a: saved nothing, wanted float32[2]",
        "  params/b: saved nothing, wanted float32[3]",
        "flax_ckpt.restore takes missing= and unexpected= for leaves that one side lacks, rename="
        " for those that are called otherwise, only= and exclude= to leave some alone",
    ]


def test_missing_leaves_are_kept(tmp_path: Path):
    save(tmp_path, {"params": {"w": full(1, 2)}, "step": 1})
    like = {"params": {"w": full(0, 2), "a": full(5, 2)}, "opt_state": {"m": full(6, 2)}, "step": 0}
    out = fc.restore(tmp_path, like, missing="keep")
    assert_same(out.state["params"], {"a": full(5, 2), "w": full(1, 2)})
    assert_same(out.state["opt_state"], like["opt_state"])
    assert out.report.kept == ("opt_state/m", "params/a")


def test_missing_leaves_come_from_init_which_is_called_once_and_only_for_them(tmp_path: Path):
    save(tmp_path, {"params": {"w": full(1, 2)}, "step": 1})
    calls: list[int] = []

    def init() -> Any:
        calls.append(1)
        return {"params": {"w": full(7, 2), "a": full(8, 2), "b": full(9, 1)}, "step": 0}

    whole = {"params": {"w": full(0, 2)}, "step": 0}
    fc.restore(tmp_path, whole, missing="init", init=init)
    assert calls == []
    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in init()["params"].items()}
    calls.clear()
    out = fc.restore(tmp_path, whole | {"params": params}, missing="init", init=init)
    assert calls == [1]
    assert_same(
        {n: np.asarray(x) for n, x in out.state["params"].items()},
        {"a": full(8, 2), "b": full(9, 1), "w": full(1, 2)},
    )
    assert out.report.initialised == ("params/a", "params/b")


def test_what_init_makes_must_fit(tmp_path: Path):
    save(tmp_path, {"params": {"w": full(1, 2)}})
    like = {"params": {"w": full(0, 2), "a": full(0, 2), "b": full(0, 2), "n": 0}}
    with pytest.raises(fc.errors.StateError) as caught:
        fc.restore(
            tmp_path, like, missing="init", init=lambda: {"params": {"a": full(0, 3), "n": 1}}
        )
    assert str(caught.value) == (
        "init() does not make the wanted leaves: params/a: float32[3], wanted float32[2], params/b:"
        " nothing, wanted float32[2]"
    )
    with pytest.raises(fc.errors.StateError, match="missing='init' needs init="):
        fc.restore(tmp_path, like, missing="init")


@pytest.mark.parametrize("options", [{"missing": "kept"}, {"unexpected": "warn"}], ids=str)
def test_another_word_for_what_to_do_is_refused(tmp_path: Path, options: Any):
    with pytest.raises(ValueError, match=r"missing must be 'error', 'keep' or 'init'.* got '\w+'"):
        fc.restore(tmp_path, {}, **options)


@pytest.mark.parametrize("missing", ["keep", "init"])
def test_another_optimizer_starts_where_the_old_one_has_no_state(tmp_path: Path, missing: Any):
    trained = train(create(tx=optax.sgd(0.1)), 0, 3)
    save(tmp_path, trained)

    def init() -> Any:
        return create(tx=optax.adam(1e-3))

    state = fc.restore_train_state(tmp_path, init(), missing=missing, init=init)
    assert_same(state.params, trained.params)
    assert_same(state.opt_state, init().opt_state)
    assert state.step == 3
    out = fc.restore(tmp_path, init(), exclude="opt_state")
    assert_same(out.state.opt_state, init().opt_state)


def test_leaves_of_the_old_optimizer_are_unexpected(tmp_path: Path):
    save(tmp_path, create(tx=optax.adam(1e-3)))
    like = create(tx=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(fc.errors.TreeMismatchError, match="opt_state/0/count: saved .*wanted noth"):
        fc.restore_train_state(tmp_path, like, missing="keep")
    state = fc.restore_train_state(tmp_path, like, missing="keep", unexpected="ignore")
    assert_same(state.opt_state, like.opt_state)


def test_unexpected_leaves_are_judged_among_what_is_selected(tmp_path: Path):
    state = model(1, 2)
    state["params"]["encoder"]["Dense_2"] = {"kernel": full(3, 2, 2)}
    state["params"]["neck"] = full(4, 2)
    save(tmp_path, state)
    message = "params/encoder/Dense_2/kernel: saved .* wanted nothing\nflax_ckpt.restore takes"
    with pytest.raises(fc.errors.TreeMismatchError, match=message) as caught:
        fc.restore(tmp_path, model(0, 0), only="params/encoder")
    assert len(caught.value.differences) == 1
    out = fc.restore(tmp_path, model(0, 0), only="params/encoder", unexpected="ignore")
    assert "params/encoder/Dense_2/kernel" in out.report.ignored
    assert "params/neck" in out.report.ignored


def test_another_shape_is_an_error_whatever_is_missing(tmp_path: Path):
    save(tmp_path, model(1, 2))
    like = model(0, 0, classes=5)
    like["params"]["new"] = full(0, 1)
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore(tmp_path, like, missing="keep", unexpected="ignore")
    assert str(caught.value).splitlines()[1:] == [
        "  params/head/bias: saved float32[3] (numpy), wanted float32[5] (numpy)",
        "  params/head/kernel: saved float32[2,3] (numpy), wanted float32[2,5] (numpy)",
    ]


# One tree, as Orbax's users have it.


def whole(root: Path, tree: Any) -> None:
    fc.save(root / "7", tree)


def test_of_a_state_in_one_tree_the_selected_leaves_are_read(tmp_path: Path, caplog: Any):
    whole(tmp_path, {**model(1, 2), "ema": {"w": full(3, 2)}})
    damage(tmp_path / "7" / "state", full(2, 2, 3))
    like = {**model(0, 0), "ema": {"w": full(0, 2)}}
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        out = fc.restore(tmp_path, like, only=["params/encoder", "step"])
    assert out.report.loaded == (*(f"params/encoder/Dense_{i}/kernel" for i in (0, 1)), "step")
    assert out.report.ignored == ("ema/w", "params/head/bias", "params/head/kernel")
    assert "only= selects nothing of ema:" in caplog.text
    params = fc.restore(tmp_path, like["params"], only="params/encoder").state
    assert params["encoder"]["Dense_0"]["kernel"].tolist() == full(1, 2, 2).tolist()


def test_of_a_state_in_one_tree_ema_goes_into_params(tmp_path: Path):
    whole(tmp_path, {"params": {"w": full(1, 2)}, "ema": {"w": full(3, 2)}, "step": 7})
    rename = {"ema": "params", "params": "unused"}
    state = fc.restore_train_state(
        tmp_path, {"params": {"w": full(0, 2)}, "step": 0}, rename=rename
    )
    assert_same(state, {"params": {"w": full(3, 2)}, "step": 7})


def test_a_tree_of_other_names_becomes_a_state(tmp_path: Path):
    whole(tmp_path, {"model": {"w": full(1, 2)}, "optimizer": {"m": full(2, 2)}})
    like = {"params": {"w": full(0, 2)}, "opt_state": {"m": full(0, 2)}}
    rename = {"model": "params", "optimizer": "opt_state"}
    state = fc.restore_train_state(tmp_path, like, rename=rename)
    assert_same(state, {"params": {"w": full(1, 2)}, "opt_state": {"m": full(2, 2)}})


def test_the_root_of_a_tree_can_be_renamed(tmp_path: Path):
    whole(tmp_path, {"w": full(1, 2), "b": full(2, 2)})
    like = {"params": {"w": full(0, 2), "b": full(0, 2)}}
    state = fc.restore_train_state(tmp_path, like, rename=[("^", "params/")])
    assert_same(state, {"params": {"b": full(2, 2), "w": full(1, 2)}})


def test_any_tree_can_be_restored_in_part(tmp_path: Path):
    whole(tmp_path, [full(1, 2), {"a": full(2, 2)}])
    state = fc.restore_train_state(tmp_path, [full(0, 2), {"a": full(0, 2)}], only="1/a")
    assert_same(state, [full(0, 2), {"a": full(2, 2)}])
