"""`restore` and `restore_train_state` on what the callback saved."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from google.protobuf.duration_pb2 import Duration
from ml_collections import ConfigDict

import flax_ckpt as fc
from tests.training.states import assert_same, create, train


def save_steps(root: Path, *steps: int, config: Any = None, **metrics: Any) -> dict[int, Any]:
    saved = {}
    state = create()
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None, config=config) as ckpt:
        for step in range(1, max(steps) + 1):
            state = train(state, step - 1, step)
            if step in steps:
                ckpt.on_step_end(step, state, metrics=metrics or None)
                saved[step] = state
    return saved


def abstract() -> Any:
    return jax.eval_shape(create)


def test_the_latest_step_comes_back_in_the_type_of_an_abstract_state(tmp_path: Path):
    saved = save_steps(tmp_path, 1, 2, 3)
    state = fc.restore_train_state(tmp_path, abstract())
    assert_same(state, saved[3])
    assert int(state.step) == 3


def test_a_concrete_state_is_filled_and_not_changed(tmp_path: Path):
    saved = save_steps(tmp_path, 1)
    like = create()
    before = jax.tree.map(lambda x: x, like)
    state = fc.restore_train_state(tmp_path, like)
    assert state.tx is like.tx
    assert state.apply_fn == like.apply_fn
    assert isinstance(state.step, int), "a fresh TrainState counts with a Python int"
    assert state.step == 1
    assert_same(state.replace(step=saved[1].step), saved[1])
    assert_same(like, before)


def test_a_step_by_number_by_path_and_by_metadata(tmp_path: Path):
    saved = save_steps(tmp_path, 1, 2)
    assert_same(fc.restore_train_state(tmp_path, abstract(), step=1), saved[1])
    assert_same(fc.restore_train_state(tmp_path / "1", abstract()), saved[1])
    found = fc.checkpointables_metadata(tmp_path / "1")
    assert_same(fc.restore_train_state(tmp_path, abstract(), step=found), saved[1])


def test_training_goes_on_bit_equal_to_an_unbroken_run(tmp_path: Path):
    save_steps(tmp_path, 3)
    resumed = train(fc.restore_train_state(tmp_path, abstract()), 3, 6)
    assert_same(resumed, train(create(), 0, 6))


def test_restored_says_what_it_holds(tmp_path: Path):
    save_steps(tmp_path, 2, config=ConfigDict({"lr": 1e-3}), loss=jnp.float32(0.5))
    out = fc.restore(tmp_path, abstract())
    assert out.step == 2
    assert out.metrics == {"loss": 0.5}
    assert out.config == ConfigDict({"lr": 1e-3})
    assert out.config_text is not None
    assert out.config_text.startswith("# proto-message: flax_ckpt.RunConfig\n")
    assert "params/Dense_0/kernel" in out.report.loaded
    assert out.report.nbytes > 0
    assert out.report.damaged == ()


def test_without_a_target_everything_comes_back_in_dicts(tmp_path: Path):
    saved = save_steps(tmp_path, 1)[1]
    out = fc.restore(tmp_path)
    assert set(out.state) == {"params", "opt_state", "train_state"}
    assert set(out.state["train_state"]) == {"step", "batch_stats", "key"}
    np.testing.assert_array_equal(
        out.state["params"]["Dense_0"]["kernel"], saved.params["Dense_0"]["kernel"]
    )


def test_a_message_of_the_users_own_comes_back_by_class_or_because_it_is_registered(tmp_path):
    save_steps(tmp_path, 1, config=Duration(seconds=5))
    assert fc.restore(tmp_path, abstract()).config == Duration(seconds=5)
    assert fc.restore(tmp_path, abstract(), config=Duration).config == Duration(seconds=5)


def test_a_message_that_nobody_registered_stays_text(tmp_path: Path):
    save_steps(tmp_path, 1, config=Duration(seconds=5))
    path = tmp_path / "1" / "config" / "proto.pbtxt"
    unregistered = path.read_text().replace("google.protobuf.Duration", "my.lab.Config")
    rewrite(path, unregistered.encode())
    out = fc.restore(tmp_path, abstract())
    assert out.config is None
    assert out.config_text == unregistered


def rewrite(path: Path, data: bytes) -> None:
    """Changes a file and the record of its checksum: as if it had been saved so."""
    import crc32c

    from flax_ckpt.format.checkpoint import Integrity

    path.write_bytes(data)
    step = path.parents[1]
    file = step / "flax_ckpt.json"
    record = Integrity.from_bytes(file.read_bytes(), str(file))
    record.crc32c[str(path.relative_to(step))] = crc32c.crc32c(data)
    file.write_bytes(record.to_bytes())


def test_every_difference_is_listed_at_once_before_anything_is_read(tmp_path: Path):
    save_steps(tmp_path, 1)
    for data in (tmp_path / "1").glob("*/d/*"):
        with data.open("r+b") as file:  # the leaves' bytes; the index lies behind them
            file.write(b"\xff" * 64)
    like = jax.eval_shape(lambda: create(width=6))
    like = like.replace(key=jax.ShapeDtypeStruct((2,), jnp.uint32))
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore_train_state(tmp_path, like, step=1)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / '1'} does not fit the wanted tree, ")
    assert "  params/Dense_0/kernel: saved float32[3,5], wanted float32[3,6]" in lines
    assert "  opt_state/1/0/mu/Dense_1/kernel: saved float32[5,2], wanted float32[6,2]" in lines
    assert len(caught.value.differences) > 10


def test_another_dtype_is_a_mismatch_unless_it_is_cast(tmp_path: Path):
    save_steps(tmp_path, 1)
    like = abstract()
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), like.params)
    with pytest.raises(fc.errors.TreeMismatchError, match=r"saved float32\[5\], wanted bfloat16"):
        fc.restore_train_state(tmp_path, like.replace(params=half))
    state = fc.restore_train_state(tmp_path, like.replace(params=half), cast=True)
    assert state.params["Dense_0"]["bias"].dtype == jnp.bfloat16


def test_rank_0_numbers_match_across_kinds_if_the_value_fits(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path) as ckpt:
        ckpt.on_step_end(300, {"params": {"n": 300, "x": np.float64(0.5), "j": jnp.float32(2)}})

    def restored(**like: Any) -> Any:
        return fc.restore_train_state(tmp_path, {"params": {"n": 0, "x": 0.0, "j": 0.0} | like})[
            "params"
        ]

    assert restored() == {"n": 300, "x": 0.5, "j": 2.0}
    weak = restored(n=jnp.asarray(0))["n"]
    assert (weak.dtype, weak.weak_type, int(weak)) == (jnp.int32, True, 300)
    assert isinstance(restored(n=np.int16(0))["n"], np.int16)
    assert restored(j=0)["j"] == 2
    with pytest.raises(fc.errors.TreeMismatchError, match=r"params/n|n: the saved number 300"):
        restored(n=np.int8(0))
    with pytest.raises(fc.errors.TreeMismatchError, match="the saved number 0.5"):
        restored(x=0)


@flax.struct.dataclass
class EvalState:
    params: Any
    batch_stats: Any
    name: str = flax.struct.field(pytree_node=False, default="eval")


def test_parts_that_the_wanted_state_has_no_place_for_are_not_read(tmp_path: Path):
    saved = save_steps(tmp_path, 1)[1]
    for data in (tmp_path / "1" / "opt_state").rglob("*"):
        if data.is_file():
            data.unlink()
    like = EvalState(abstract().params, abstract().batch_stats)
    with pytest.raises(fc.errors.TreeMismatchError, match="train_state/step: saved .*wanted noth"):
        fc.restore_train_state(tmp_path, like, step=1)
    state = fc.restore_train_state(tmp_path, like, step=1, unexpected="ignore")
    assert isinstance(state, EvalState)
    assert_same(state.params, saved.params)
    assert_same(state.batch_stats, saved.batch_stats)


class Pair(NamedTuple):
    params: Any
    ema: Any


@dataclass
class Plain:
    params: Any
    opt_state: Any


jax.tree_util.register_dataclass(Plain, ["params", "opt_state"], [])


@pytest.mark.parametrize(
    "state",
    [
        Pair({"w": np.ones(2)}, {"w": np.zeros(2)}),
        Plain({"w": np.ones(2)}, optax.EmptyState()),
        {"params": {"w": np.ones(2)}, "extra": None},
        [np.ones(2), {"a": 1}],
        np.ones(3),
        {"params": {}},
    ],
    ids=lambda state: type(state).__name__,
)
def test_any_tree_may_be_a_state(tmp_path: Path, state: Any):
    with fc.CheckpointCallback(tmp_path) as ckpt:
        ckpt.on_step_end(4, state)
    back = fc.restore_train_state(tmp_path, state)
    assert type(back) is type(state)
    assert_same(back, state)


def test_params_alone_restore_from_a_training_step(tmp_path: Path):
    saved = save_steps(tmp_path, 1)[1]
    out = fc.restore(tmp_path, abstract().params)
    assert_same(out.state, saved.params)
    assert all(name.startswith("params/") for name in out.report.loaded)


def test_another_tree_than_the_params_is_compared_with_them(tmp_path: Path):
    save_steps(tmp_path, 1)
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore_train_state(tmp_path, [np.ones(2)])
    lines = str(caught.value).splitlines()
    assert "  params/0: saved nothing, wanted float64[2]" in lines
    assert "  params/Dense_0/kernel: saved float32[3,5], wanted nothing" in lines


def test_a_damaged_latest_step_is_passed_over_with_a_warning(tmp_path: Path, caplog):
    saved = save_steps(tmp_path, 1, 2)
    damage(tmp_path / "2" / "params")
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        out = fc.restore(tmp_path, abstract())
    assert out.step == 1
    assert_same(out.state, saved[1])
    assert out.report.damaged[0][0] == 2
    assert "step 2 is damaged, trying the one before it" in caplog.text
    message = "BatchNorm_0/bias: damaged: bytes 0 to 24 of .*/2/params/d/"
    with pytest.raises(fc.errors.DamagedCheckpointError, match=message):
        fc.restore(tmp_path, abstract(), step=2)


def damage(tree: Path) -> None:
    (data,) = (tree / "d").iterdir()
    with data.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def test_if_every_step_is_damaged_the_error_says_so(tmp_path: Path):
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "1" / "params")
    damage(tmp_path / "2" / "params")
    with pytest.raises(fc.errors.DamagedCheckpointError, match=f"none of the steps of {tmp_path}"):
        fc.restore(tmp_path, abstract())


def test_wrong_paths_say_what_is_there(tmp_path: Path):
    save_steps(tmp_path / "run", 1, 2)
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="does not exist; .* has: run"):
        fc.restore(tmp_path / "rum", abstract())
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="no committed step; it has: run"):
        fc.restore(tmp_path, abstract())
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="has no step 7; it has: 1, 2"):
        fc.restore(tmp_path / "run", abstract(), step=7)
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="not a root with step 2"):
        fc.restore(tmp_path / "run" / "1", abstract(), step=2)
    with pytest.raises(FileNotFoundError):
        fc.restore(os.fspath(tmp_path / "rum"), abstract())
    with pytest.raises(ValueError, match="step must be a number, 'latest' or 'best', got 'last'"):
        fc.restore(tmp_path / "run", abstract(), step="last")
