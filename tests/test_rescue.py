"""`on_damage="skip"`: what is whole comes back, and what is not is named."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, StateError
from tests.test_verify import flip, flip_leaf, orbax_save
from tests.training import states
from torture import damage
from torture.damage import values

TREE = {"a": np.arange(2000.0), "b": [jnp.ones(3), 7], "t": "x", "z": np.full(2000, 2.0)}
ABSENT = fc.PLACEHOLDER


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    fc.save(tmp_path / "ckpt", TREE)
    return tmp_path / "ckpt"


def equal(found: Any, wanted: Any) -> bool:
    return damage.bits_of(found) == damage.bits_of(wanted)


def test_one_bad_chunk_costs_one_leaf(ckpt: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_leaf(ckpt / "state", "a")
    with pytest.raises(DamagedCheckpointError, match="^a: damaged"):
        fc.load(ckpt)
    assert equal(fc.load(ckpt, on_damage="skip"), TREE | {"a": ABSENT})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{ckpt}: damaged, and not loaded:\n  state/a: damaged: bytes " in record.getMessage()
    found = fc.load(ckpt, TREE, on_damage="skip")
    assert found["a"] is ABSENT
    assert equal(fc.load_async(ckpt, on_damage="skip").result(), TREE | {"a": ABSENT})
    both = fc.load_checkpointables_async(ckpt, {"state": None}, on_damage="skip").result()
    assert equal(both, {"state": TREE | {"a": ABSENT}})


def test_nothing_is_said_of_a_whole_one(ckpt: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert equal(fc.load(ckpt, on_damage="skip"), TREE)
    assert caplog.records == []


def test_small_leaves_and_strings(ckpt: Path) -> None:
    flip(ckpt / "state/_strings.json")
    ref = values(ckpt / "state")[b"b.1/c"]
    flip(ckpt / "state" / ref.file, ref.offset)
    wanted = TREE | {"b": [jnp.ones(3), ABSENT], "t": ABSENT}
    assert equal(fc.load(ckpt, on_damage="skip"), wanted)


def test_a_data_file_cut_off_costs_what_is_gone(ckpt: Path) -> None:
    ref = values(ckpt / "state")[b"z/c/0"]
    data = ckpt / "state" / ref.file
    whole = data.read_bytes()
    data.write_bytes(whole[: ref.offset] + bytes(100) + whole[ref.offset + 100 :])
    assert equal(fc.load(ckpt, on_damage="skip"), TREE | {"z": ABSENT})
    data.write_bytes(whole[:-10])  # with it goes the index
    with pytest.raises(DamagedCheckpointError, match="the file was cut off"):
        fc.load(ckpt, on_damage="skip")


def test_of_several_data_files_one_is_lost(tmp_path: Path) -> None:
    context = fc.Context()
    context.array.saving.ocdbt_target_data_file_size = 10_000
    with context:
        fc.save(tmp_path / "ckpt", TREE)
    state = tmp_path / "ckpt/state"
    (state / values(state)[b"a/c/0"].file).unlink()
    assert equal(fc.load(tmp_path / "ckpt", on_damage="skip"), TREE | {"a": ABSENT})
    (one,) = fc.verify(tmp_path / "ckpt").checkpoints
    assert [path for path, _ in one.leaves] == ["state/a"]
    assert "the data file is missing" in one.leaves[0][1]


def test_plain_and_sharded_arrays(tmp_path: Path) -> None:
    context = fc.Context()
    context.array.saving.use_ocdbt = False
    tree = damage.tree_of(1, 8)
    with context:
        fc.save(tmp_path / "ckpt", tree)
    (tmp_path / "ckpt/state/sharded/c/1/0").unlink()
    found = fc.load(tmp_path / "ckpt", on_damage="skip")
    assert equal(found, tree | {"sharded": ABSENT})
    assert found["replicas"].sharding == tree["replicas"].sharding


def test_what_orbax_wrote(tmp_path: Path) -> None:
    path = orbax_save(tmp_path / "ckpt")
    (large,) = [p for p in (path / "state").rglob("d/*") if p.stat().st_size > 5000]
    large.write_bytes(bytes(100))
    found = fc.load(path, on_damage="skip")
    assert found["w"] is ABSENT
    assert equal(found["j"], jnp.ones(7))


def test_damage_to_a_description_raises(ckpt: Path) -> None:
    for file in ("state/manifest.ocdbt", "state/_METADATA", "flax_ckpt.json"):
        whole = (ckpt / file).read_bytes()
        flip(ckpt / file)
        with pytest.raises(DamagedCheckpointError, match=file):
            fc.load(ckpt, on_damage="skip")
        (ckpt / file).write_bytes(whole)


def test_shardings_are_not_needed(ckpt: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(ckpt / "state/_sharding")
    assert equal(fc.load(ckpt, on_damage="skip"), TREE)
    assert "state/_sharding: CRC-32C" in caplog.text


def test_another_word_is_refused(ckpt: Path) -> None:
    with pytest.raises(ValueError, match="on_damage must be 'raise' or 'skip', got 'ignore'"):
        fc.load(ckpt, on_damage="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_damage must be"):
        fc.restore(ckpt, on_damage="ignore")  # type: ignore[arg-type]


# Training states.


@functools.cache
def after(steps: int) -> Any:
    return states.train(states.create(), 0, steps)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "run"
    with fc.CheckpointCallback(root, every_n_steps=1, config=CONFIG) as callback:
        for step in (1, 2):
            callback.on_step_end(step, after(step), metrics={"loss": 3.0 - step})
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


CONFIG = {"lr": 0.1}
KERNEL = "params/Dense_0/kernel"


def lose_kernel(root: Path) -> None:
    step = root / "2"
    key = b"Dense_0.kernel/c/0/0"
    ref = values(step / "params")[key]
    flip(step / "params" / ref.file, ref.offset)


def test_a_damaged_leaf_stays_as_it_is_in_the_wanted_state(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lose_kernel(root)
    like, wanted = after(0), after(2)
    out = fc.restore(root, like, on_damage="skip")
    kernel = like.params["Dense_0"]["kernel"]
    expected = jax.tree.map(lambda x: x, wanted.params)
    expected["Dense_0"]["kernel"] = kernel
    states.assert_same(out.state, wanted.replace(params=expected, step=2))
    assert (out.step, out.metrics) == (2, {"loss": 1.0})
    assert out.report.kept == (KERNEL,)
    assert KERNEL not in out.report.loaded
    ((name, why),) = out.report.damaged
    assert name == KERNEL
    assert f"damaged: {KERNEL}: damaged: bytes " in str(out.report)
    assert why in caplog.text
    with pytest.raises(DamagedCheckpointError):
        fc.restore(root, like, step=2)


def test_it_is_taken_from_init_where_the_wanted_state_is_abstract(root: Path) -> None:
    lose_kernel(root)
    abstract = jax.eval_shape(states.create)
    with pytest.raises(StateError, match=KERNEL):
        fc.restore(root, abstract, on_damage="skip")
    made: list[Any] = []

    def init() -> Any:
        made.append(1)
        return after(0)

    out = fc.restore(root, abstract, init=init, on_damage="skip")
    assert out.report.initialised == (KERNEL,)
    assert equal(out.state.params["Dense_0"]["kernel"], after(0).params["Dense_0"]["kernel"])
    assert made == [1]
    fc.restore_train_state(root, abstract, init=init, on_damage="skip", step=1)
    assert made == [1]


def test_without_a_wanted_state_it_is_left_out(root: Path) -> None:
    lose_kernel(root)
    out = fc.restore(root, on_damage="skip")
    assert out.state["params"]["Dense_0"]["kernel"] is ABSENT
    assert out.report.kept == ()
    assert out.report.damaged[0][0] == KERNEL


def test_a_damaged_config_and_damaged_metrics(root: Path) -> None:
    flip(root / "2/config/proto.pbtxt")
    flip(root / "2/metrics/metrics")
    out = fc.restore(root, after(0), on_damage="skip")
    assert (out.step, out.config, out.metrics) == (2, None, None)
    assert [name for name, _ in out.report.damaged] == ["config", "metrics"]


def test_a_step_that_cannot_be_rescued_is_passed_over(root: Path) -> None:
    flip(root / "2/params/manifest.ocdbt")
    out = fc.restore(root, after(0), on_damage="skip")
    assert out.step == 1
    assert out.report.damaged[0][0] == 2


def test_renamed_leaves_have_the_name_that_is_wanted(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"params": {"old": np.ones(3), "w": np.ones(4)}})
    flip_leaf(tmp_path / "ckpt/state", "params.old")
    like = {"params": {"new": np.zeros(3), "w": np.zeros(4)}}
    rename = {"params/old": "params/new"}
    out = fc.restore(tmp_path / "ckpt", like, rename=rename, on_damage="skip")
    assert equal(out.state, {"params": {"new": np.zeros(3), "w": np.ones(4)}})
    assert [name for name, _ in out.report.damaged] == ["params/new"]


def test_modules_of_nnx(tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with fc.CheckpointCallback(tmp_path / "run", every_n_steps=1) as callback:
        callback.on_step_end(1, model)
    ref = values(tmp_path / "run/1/params")[b"kernel/c/0/0"]
    flip(tmp_path / "run/1/params" / ref.file, ref.offset)
    like = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    out = fc.restore(tmp_path / "run", like, on_damage="skip")
    assert equal(out.state.kernel[...], like.kernel[...])
    assert equal(out.state.bias[...], model.bias[...])
    assert [name for name, _ in out.report.damaged] == ["params/kernel"]
