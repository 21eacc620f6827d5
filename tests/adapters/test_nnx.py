"""NNX modules, optimizers and states, and boxed Linen params: saved by kind, and back again."""

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_ckpt as fc
from flax_ckpt.format.tree import TreeMetadata
from tests.training.nnx_states import assert_same, create, leaves, model, train

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def save(root: Path, state: Any, step: int = 0) -> Path:
    with fc.CheckpointCallback(root, every_n_steps=1, at_end=False) as ckpt:
        assert ckpt.on_step_end(step, state)
    return root


def back(root: Path, state: Any, like: Any = None) -> Any:
    """Saves a state and restores it."""
    return fc.restore_train_state(save(root, state), state if like is None else like)


@pytest.fixture(scope="module")
def trained() -> Any:
    return train(create(), 0, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, trained: Any) -> Path:
    """A run whose only step is a whole training state."""
    return save(tmp_path_factory.mktemp("nnx"), trained, 2)


def names(step: Path, part: str) -> list[tuple[tuple[str, int], ...]]:
    data = (step / part / "_METADATA").read_bytes()
    entries = TreeMetadata.from_bytes(data, part).entries
    return sorted(tuple((key.key, key.kind) for key in entry.path) for entry in entries)


# On disk.


def test_variables_are_saved_by_kind_under_pure_names(saved: Path):
    loaded = set(fc.restore(saved).report.loaded)
    layers = ["first", "head/out", "layers/0", "layers/1"]
    params = {f"params/{layer}/{leaf}" for layer in layers for leaf in ("bias", "kernel")}
    params |= {"params/norm/bias", "params/norm/scale"}
    assert {name for name in loaded if name.startswith("params/")} == params
    assert {name for name in loaded if name.startswith("train_state/")} == {
        "train_state/step",
        "train_state/batch_stats/norm/mean",
        "train_state/batch_stats/norm/var",
        "train_state/rngs/dropout/rngs/count",
        "train_state/rngs/dropout/rngs/key",
        "train_state/variable/calls",
        "train_state/arrays/scale",
    }


def test_the_optimizer_state_is_saved_as_that_of_a_train_state(tmp_path: Path):
    net, optimizer = create()
    save(tmp_path / "nnx", (net, optimizer))
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    params["layers"] = {str(i): layer for i, layer in params["layers"].items()}
    linen = TrainState.create(apply_fn=print, params=params, tx=optimizer.tx)
    save(tmp_path / "linen", linen)
    for part in ("params", "opt_state"):
        assert names(tmp_path / "nnx/0", part) == names(tmp_path / "linen/0", part)
    like = nnx.eval_shape(create)[1]
    state = fc.restore_train_state(
        tmp_path / "nnx", jax.eval_shape(lambda: linen), unexpected="ignore"
    )
    assert int(state.opt_state[1][0].count) == 0
    restored = fc.restore_train_state(tmp_path / "linen", like, cast=True)
    assert_same(restored, optimizer)


def test_orbax_and_consumers_of_params_read_nested_dicts(saved: Path, trained: Any):
    kernel = np.asarray(trained[0].layers[1].kernel[...])
    ours = fc.load_checkpointables(saved / "2", {"params": None})["params"]
    theirs = ocp.load_checkpointables(saved / "2", {"params": None})["params"]
    for params in (ours, theirs):
        assert set(params) == {"first", "head", "layers", "norm"}
        np.testing.assert_array_equal(params["layers"]["1"]["kernel"], kernel)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ours)
    assert set(fc.restore_train_state(saved, wanted)) == set(ours)


class Stat(nnx.Variable):
    """A type of variable that nobody registered a name for."""


class RunningMeanOfLoss(nnx.BatchStat):
    """A type of its own, not a batch statistic by name."""


def test_other_types_of_variables_are_saved_under_their_names(tmp_path: Path):
    state = nnx.Dict(
        a=Stat(jnp.ones(1)),
        b=RunningMeanOfLoss(jnp.ones(1)),
        c=nnx.Cache({"k": jnp.ones(1), "v": (jnp.ones(2), 3)}),
        d=nnx.LoRAParam(jnp.ones(1)),
        e=nnx.Intermediate((jnp.ones(1),)),
    )
    assert_same(back(tmp_path, state, nnx.Dict(nnx.clone(state))), state)
    loaded = fc.restore(tmp_path).report.loaded
    assert set(loaded) == {
        "params/d",
        "train_state/stat/a",
        "train_state/running_mean_of_loss/b",
        "train_state/cache/c/k",
        "train_state/cache/c/v/0",
        "train_state/cache/c/v/1",
        "train_state/intermediates/e/0",
    }


# What comes back.


def test_a_module_comes_back_as_a_new_one_with_its_graph(saved: Path, trained: Any):
    like = model(seed=1)
    like.width = 50
    like.first.kernel.set_metadata(note="mine")
    before = leaves(like)
    restored = fc.restore_train_state(saved, like)
    assert restored is not like
    assert restored.tied is restored.layers[0]
    assert restored.width == 50, "static attributes are those of `like`"
    assert restored.first.kernel.get_metadata("note") == "mine", "so are metadata"
    for name, value in leaves(like).items():
        assert value.tobytes() == before[name].tobytes(), "`like` is not changed"
    restored.first.bias[...] += 1
    assert leaves(like)["first/bias"].tobytes() == before["first/bias"].tobytes()
    np.testing.assert_array_equal(restored.tied.kernel[...], trained[0].tied.kernel[...])


def test_random_streams_go_on_where_they_were(saved: Path, trained: Any):
    restored = fc.restore_train_state(saved, model(seed=1))
    original = nnx.clone(trained[0])
    assert int(restored.dropout.rngs.count[...]) == 6
    x = jnp.ones((4, 3))
    for _ in range(2):
        np.testing.assert_array_equal(restored(x), original(x))


class Pair(NamedTuple):
    net: Any
    optimizer: Any


@dataclasses.dataclass
class Plain:
    net: Any
    optimizer: Any


jax.tree_util.register_dataclass(Plain, ["net", "optimizer"], [])

KINDS = {
    "a module and its optimizer": lambda net, optimizer: (net, optimizer),
    "the other way round": lambda net, optimizer: [optimizer, net],
    "in a dict": lambda net, optimizer: {"model": net, "tx": optimizer},
    "in a named tuple": Pair,
    "in a dataclass": Plain,
    "a module": lambda net, optimizer: net,
    "an optimizer": lambda net, optimizer: optimizer,
    "a state": lambda net, optimizer: nnx.state(net),
    "a state of the params": lambda net, optimizer: nnx.state(net, nnx.Param),
    "what nnx.split returns": lambda net, optimizer: nnx.split(net),
    "of both": lambda net, optimizer: nnx.split((net, optimizer)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("abstract", [False, True], ids=["concrete", "abstract"])
def test_each_kind_of_state_restores_from_a_full_step(
    saved: Path, trained: Any, kind: str, abstract: bool
):
    like = nnx.eval_shape(create) if abstract else create(1)
    restored = fc.restore_train_state(saved, KINDS[kind](*like))
    assert_same(restored, KINDS[kind](*trained))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_state_saves_and_restores(tmp_path: Path, trained: Any, kind: str):
    state = KINDS[kind](*trained)
    assert_same(back(tmp_path, state, KINDS[kind](*create(1))), state)


def test_a_model_and_optimizer_in_one(tmp_path: Path, trained: Any, saved: Path):
    def both(seed: int = 0) -> Any:
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        return nnx.ModelAndOptimizer(model(seed), tx)

    restored = fc.restore_train_state(saved, both(1))
    assert_same((restored.model, restored.opt_state), (trained[0], trained[1].opt_state))
    assert int(restored.step[...]) == 2
    save(tmp_path, restored, 2)
    for part in ("params", "opt_state", "train_state"):
        assert names(tmp_path / "2", part) == names(saved / "2", part)
    assert_same(fc.restore_train_state(tmp_path, nnx.eval_shape(both)).model, trained[0])


def test_a_module_leaves_the_optimizer_state_unread(tmp_path: Path, trained: Any):
    save(tmp_path, trained)
    for file in (tmp_path / "0" / "opt_state").rglob("*"):
        if file.is_file():
            file.unlink()
    assert_same(fc.restore_train_state(tmp_path, model(1), step=0), trained[0])


def test_those_who_hold_references_update_in_place(saved: Path, trained: Any):
    net, optimizer = create(1)
    layer = net.tied
    new = fc.restore_train_state(saved, (net, optimizer))
    nnx.update((net, optimizer), nnx.state(new))
    assert_same((net, optimizer), trained)
    assert net.tied is layer


def test_the_same_state_restores_into_a_field_called_params(tmp_path: Path):
    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net)
    state = TrainState.create(apply_fn=graph.apply, params=params, tx=optax.adam(1e-3))
    restored = back(tmp_path, state, jax.eval_shape(lambda: state))
    assert isinstance(restored.params["kernel"], nnx.Param)
    np.testing.assert_array_equal(restored.params["kernel"][...], net.kernel[...])
    assert_same(nnx.merge(graph, restored.params), net)
    loaded = fc.restore(tmp_path).report.loaded
    assert {"params/kernel", "opt_state/0/mu/kernel"} <= set(loaded)


def test_several_modules_are_told_apart_by_their_place(tmp_path: Path):
    def gan(seed: int) -> Any:
        nets = {name: nnx.Linear(2, 2, rngs=nnx.Rngs(seed + i)) for i, name in enumerate("gd")}
        tx = optax.adam(1e-3)
        return nets | {f"tx_{n}": nnx.Optimizer(nets[n], tx, wrt=nnx.Param) for n in "gd"}

    state = gan(0)
    assert_same(back(tmp_path, state, gan(7)), state)
    loaded = set(fc.restore(tmp_path).report.loaded)
    assert {"params/g/kernel", "params/d/bias", "opt_state/tx_d/0/mu/bias"} <= loaded
    assert {"train_state/step/tx_d", "train_state/step/tx_g"} <= loaded


def test_leaves_beside_the_module_are_saved_too(tmp_path: Path):
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = {"net": net, "epoch": 3, "key": jax.random.key(5), "rngs": nnx.Rngs(1)}
    like = {"net": net, "epoch": 0, "key": jax.random.key(0), "rngs": nnx.Rngs(0)}
    restored = back(tmp_path, state, like)
    assert restored["epoch"] == 3
    assert_same(restored, state)
    loaded = set(fc.restore(tmp_path).report.loaded)
    assert {"train_state/other/epoch", "train_state/rngs/rngs/default/key"} <= loaded
    assert_same(fc.restore_train_state(tmp_path, net), net)


# From Orbax, and in boxes.


def by_v0(path: Path, tree: Any) -> Path:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def by_manager(path: Path, tree: Any) -> Path:
    with v0.CheckpointManager(path) as manager:
        manager.save(2, args=v0.args.StandardSave(tree))
    return path


def by_v1(path: Path, tree: Any) -> Path:
    ocp.save(path, tree)
    return path


@pytest.mark.parametrize("write", [by_v0, by_manager, by_v1])
@pytest.mark.parametrize("kind", ["a module", "an optimizer", "a state", "a state of the params"])
def test_states_that_orbax_saved_with_their_boxes_are_read(
    tmp_path: Path, trained: Any, write: Any, kind: str
):
    expected = KINDS[kind](*trained)
    root = write(tmp_path / "root", nnx.state(expected))
    assert any(name.endswith("/value") for name in fc.restore(root).report.loaded)
    assert_same(fc.restore_train_state(root, KINDS[kind](*create(1))), expected)


def test_pairs_that_orbax_saved_with_their_boxes_are_read(tmp_path: Path, trained: Any):
    ocp.save(tmp_path / "tuple", tuple(map(nnx.state, trained)))
    assert_same(fc.restore_train_state(tmp_path / "tuple", create(1)), trained)
    state = nnx.state(trained)
    ocp.save(tmp_path / "split", state)
    assert_same(fc.restore_train_state(tmp_path / "split", nnx.state(create(1))), state)
    assert_same(fc.restore_train_state(tmp_path / "split", create(1)), trained)


@pytest.mark.parametrize("write", [by_v0, by_manager, by_v1])
def test_pure_dicts_that_orbax_saved_are_read(tmp_path: Path, trained: Any, write: Any):
    root = write(tmp_path / "root", nnx.to_pure_dict(nnx.state(trained[0])))
    assert_same(fc.restore_train_state(root, model(1)), trained[0])


def test_params_that_orbax_saved_with_their_boxes_as_a_part(tmp_path: Path, trained: Any):
    params = nnx.state(trained[0], nnx.Param)
    ocp.save_checkpointables(tmp_path / "step", {"params": params})
    like = nnx.state(model(1), nnx.Param)
    assert_same(fc.restore_train_state(tmp_path / "step", like), params)


def test_a_whole_state_under_field_names_is_read_by_kind(tmp_path: Path, trained: Any):
    net, optimizer = trained
    state = {
        "params": nnx.to_pure_dict(nnx.state(net, nnx.Param)),
        "opt_state": nnx.as_pure(optimizer.opt_state),
        "step": 2,
    }
    ocp.save(tmp_path / "whole", state)
    assert_same(fc.restore_train_state(tmp_path / "whole", create(1)[1]), optimizer)
    params = nnx.state(model(1), nnx.Param)
    assert_same(fc.restore_train_state(tmp_path / "whole", params), nnx.state(net, nnx.Param))


class Boxed(nn.Module):
    """Two layers with boxed kernels, one by mesh axes and one by logical axes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        x = nn.Dense(4, kernel_init=nn.with_partitioning(init, ("x", "y")))(x)
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(x)


def boxed() -> TrainState:
    params = Boxed().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return TrainState.create(apply_fn=Boxed().apply, params=params, tx=optax.adam(1e-3))


def test_boxed_linen_params_keep_their_boxes(tmp_path: Path):
    state = boxed()
    restored = back(tmp_path, state, jax.eval_shape(boxed))
    assert jax.tree.structure(restored.params) == jax.tree.structure(state.params)
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state.opt_state)
    kernels = [restored.params[layer]["kernel"] for layer in ("Dense_0", "Dense_1")]
    assert [type(kernel) for kernel in kernels] == [nn.Partitioned, nn.LogicallyPartitioned]
    assert [kernel.names for kernel in kernels] == [("x", "y"), ("embed", "mlp")]
    assert restored.opt_state[0].mu["Dense_0"]["kernel"].names == ("x", "y")
    np.testing.assert_array_equal(kernels[0].unbox(), nn.unbox(state.params)["Dense_0"]["kernel"])


def test_boxed_linen_params_are_called_as_orbax_calls_them(tmp_path: Path):
    state = boxed()
    save(tmp_path, state)
    ocp.save(tmp_path / "orbax", state)
    ours = fc.restore(tmp_path).report.loaded
    theirs = fc.restore(tmp_path / "orbax").report.loaded
    assert {f"state/{name.removeprefix('train_state/')}" for name in ours} == set(theirs)
    assert "params/Dense_0/kernel/value" in ours
    restored = fc.restore_train_state(tmp_path / "orbax", jax.eval_shape(boxed))
    assert restored.params["Dense_0"]["kernel"].names == ("x", "y")


def test_boxes_may_be_there_or_not(tmp_path: Path):
    state = boxed()
    bare = state.replace(params=nn.unbox(state.params), opt_state=nn.unbox(state.opt_state))
    for root, there, wanted in (("a", state, bare), ("b", bare, state)):
        restored = back(tmp_path / root, there, wanted)
        assert jax.tree.structure(restored) == jax.tree.structure(wanted)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(x, y)


# Shardings.


class Wide(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
        self.dense = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def wide() -> Any:
    net = Wide(nnx.Rngs(0))
    return net, nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)


def mesh(x: int, y: int) -> Mesh:
    return jax.make_mesh((x, y), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def with_shardings(abstract: Any, target: Mesh) -> Any:
    """An abstract state with the shardings that its variables' metadata name."""
    graph, state = nnx.split(abstract)
    shardings = nnx.get_named_sharding(state, target)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return nnx.merge(graph, placed)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with jax.set_mesh(mesh(4, 2)):
        state = nnx.jit(wide)()
    assert state[0].dense.kernel[...].sharding.spec == P("x", "y")
    return save(tmp_path_factory.mktemp("sharded"), state)


def test_abstract_modules_restore_to_the_shardings_asked_for(sharded: Path):
    target = mesh(2, 4)
    with jax.set_mesh(target):
        like = with_shardings(nnx.eval_shape(wide), target)
    net, optimizer = fc.restore_train_state(sharded, like)
    for kernel in (net.dense.kernel, optimizer.opt_state[0].mu["dense"]["kernel"]):
        assert kernel[...].sharding == NamedSharding(target, P("x", "y"))
        assert kernel.get_metadata("out_sharding") == ("x", "y"), "the metadata are kept"
    assert net.dense.bias[...].sharding.is_fully_replicated
    _, expected = nnx.split(fc.restore_train_state(sharded, wide_on_one_device()))
    np.testing.assert_array_equal(net.dense.kernel[...], expected[0]["dense"]["kernel"][...])


def wide_on_one_device() -> Any:
    with nnx.use_eager_sharding(False):
        return wide()


def test_abstract_modules_without_shardings_restore_to_the_saved_ones(sharded: Path):
    net, _ = fc.restore_train_state(sharded, nnx.eval_shape(wide_on_one_device))
    assert net.dense.kernel[...].sharding == NamedSharding(mesh(4, 2), P("x", "y"))


def test_abstract_modules_made_under_a_mesh_restore_to_it(sharded: Path):
    with jax.set_mesh(mesh(2, 2)):
        net, _ = fc.restore_train_state(sharded, nnx.eval_shape(wide))
    assert net.dense.kernel[...].sharding == NamedSharding(mesh(2, 2), P("x", "y"))


def test_what_get_abstract_model_returns_restores(sharded: Path):
    target = mesh(8, 1)
    with jax.set_mesh(target):
        graph, like = nnx.get_abstract_model(lambda: Wide(nnx.Rngs(0)), target)
    state = fc.restore_train_state(sharded, like)
    assert isinstance(state, nnx.State)
    net = nnx.merge(graph, state)
    assert net.dense.kernel[...].sharding == NamedSharding(target, P("x", "y"))
    assert net.dense.kernel.get_metadata("out_sharding") == ("x", "y")


# In the loop.


class Held(fc.handlers.PyTreeHandler):
    """Its background part waits until it is released."""

    release = threading.Event()

    async def save(self, directory, checkpointable):
        rest = await super().save(directory, checkpointable)

        async def write():
            assert Held.release.wait(60)
            await rest

        return write()


def test_an_update_in_place_does_not_tear_a_save_in_flight(tmp_path: Path):
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(Held)
    state = [*train(create(), 0, 1), nnx.Dict(table=np.zeros(2))]
    expected = [*nnx.clone(state[:2]), nnx.Dict(table=np.zeros(2))]
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=context, at_end=False)
    ckpt.on_step_end(1, state)
    assert ckpt.latest_step is None
    train(state[:2], 1, 3)
    state[2].table[:] = 7
    Held.release.set()
    ckpt.close()
    like = [*create(1), nnx.Dict(table=np.ones(2))]
    assert_same(fc.restore_train_state(tmp_path, like), expected)


def test_a_mismatch_names_the_leaf_as_it_is_saved(saved: Path):
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore_train_state(saved, model(width=6))
    lines = str(caught.value).splitlines()
    assert "  params/first/kernel: saved float32[3,5], wanted float32[3,6]" in lines
    assert "  train_state/batch_stats/norm/mean: saved float32[5], wanted float32[6]" in lines
    other = nnx.Dict(first=nnx.Linear(3, 5, rngs=nnx.Rngs(0)), more=nnx.Param(jnp.ones(1)))
    with pytest.raises(fc.errors.TreeMismatchError) as caught:
        fc.restore_train_state(saved, other)
    lines = str(caught.value).splitlines()
    assert "  params/more: saved nothing, wanted float32[1]" in lines
    assert "  params/layers/0/bias: saved float32[5], wanted nothing" in lines


def test_an_abstract_module_needs_init_where_there_is_nothing_to_restore(tmp_path: Path):
    ckpt = fc.CheckpointCallback(tmp_path)
    like = nnx.eval_shape(create)
    with pytest.raises(fc.errors.StateError, match="the state given is abstract: pass init="):
        ckpt.restore_or_init(like)
    state, step = ckpt.restore_or_init(like, init=create)
    assert step == 0
    assert_same(state, create())
    concrete = create()
    assert ckpt.restore_or_init(concrete) == (concrete, 0)


class NoPyTree(nnx.Module, pytree=False):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


def test_a_module_that_is_no_pytree(tmp_path: Path):
    assert back(tmp_path / "a", NoPyTree()).w[...].tolist() == [1, 1]
    with pytest.raises(fc.errors.StateError, match="abstract"):
        fc.CheckpointCallback(tmp_path / "b").restore_or_init(nnx.eval_shape(NoPyTree))


def test_another_step_than_the_optimizer_counts_is_warned_of(tmp_path: Path, caplog):
    state = train(create(), 0, 2)
    save(tmp_path, state, 2)
    assert not caplog.text
    save(tmp_path, state, 3)
    assert "step 3 is saved, but the state counts 2 updates" in caplog.text


RESUME = """
import hashlib, sys
sys.path.insert(0, {root!r})
from flax import nnx
import flax_ckpt as fc
from tests.training.nnx_states import create, leaves, train

with fc.CheckpointCallback({path!r}, every_n_steps=4, at_end=False) as ckpt:
    state, step = ckpt.restore_or_init(nnx.eval_shape(create), init=create)
    first = step
    while step < 8:
        train(state, step, step + 1)
        step += 1
        if step == 4 or first == 0:
            ckpt.on_step_end(step, state) if step <= 4 else None
digest = hashlib.sha256()
for name, value in sorted(leaves(state).items()):
    digest.update(name.encode() + str(value.dtype).encode() + value.tobytes())
print(first, digest.hexdigest(), "orbax" in sys.modules)
"""


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path: Path, run_child: Any):
    root = str(Path(__file__).parents[2])
    program = RESUME.format(root=root, path=str(tmp_path / "run"))
    unbroken, resumed = (run_child(program).stdout.split() for _ in range(2))
    assert (unbroken[0], resumed[0]) == ("0", "4")
    assert unbroken[1] == resumed[1]
    assert resumed[2] == "False", "NNX does not load Orbax, nor do we"


def test_nnx_is_not_loaded_by_us(tmp_path: Path, run_child: Any):
    program = """
        import sys
        import flax_ckpt as fc
        with fc.CheckpointCallback(sys.argv[1]) as ckpt:
            ckpt.on_step_end(1, {"params": {"w": 1.0}, "step": 1})
        print(fc.restore_train_state(sys.argv[1], {"params": {"w": 0.0}, "step": 0}))
        print([name for name in ("flax", "flax.linen", "flax.nnx") if name in sys.modules])
    """
    done = run_child(program, tmp_path / "run")
    assert done.stdout.splitlines() == ["{'params': {'w': 1.0}, 'step': 1}", "[]"]


# Edges.


@pytest.mark.parametrize(
    "make",
    [
        nnx.Dict,
        lambda: nnx.List([]),
        lambda: nnx.Dict(stat=nnx.BatchStat(jnp.ones(2))),
        lambda: nnx.Dict(a=nnx.Dict(), b=nnx.Param(jnp.ones(2))),
        lambda: nnx.Rngs(0, dropout=jax.random.key(1)),
        lambda: nnx.MultiMetric(loss=nnx.metrics.Average("loss")),
        lambda: nnx.Param(jnp.ones(2)),
        lambda: {"w": nnx.Param(jnp.ones(2)), "b": nnx.Param(None)},
        lambda: nnx.Dict(a=nnx.Variable(5), b=nnx.Variable("text"), c=nnx.Variable(None)),
        lambda: nnx.List([nnx.Param(jnp.full(1, float(i))) for i in range(12)]),
        lambda: nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu),
        lambda: nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False),
        lambda: nnx.state(nnx.Dict()),
        lambda: nnx.as_pure(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
    ],
)
def test_unusual_modules_come_back(tmp_path: Path, make: Any):
    state = make()
    assert_same(back(tmp_path, state, make()), state)


def test_bare_params_restore_into_a_state_without_variables(saved: Path, trained: Any):
    params = nnx.as_pure(nnx.state(trained[0], nnx.Param))
    assert_same(fc.restore_train_state(saved, jax.tree.map(jnp.zeros_like, params)), params)


def test_random_streams_and_layers_under_vmap(tmp_path: Path):
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def layers(rngs: nnx.Rngs) -> Any:
        return nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    state = layers(nnx.Rngs(0))
    assert state[1].rngs.key[...].shape == (4,)
    assert_same(back(tmp_path, state, layers(nnx.Rngs(1))), state)
    abstract = nnx.eval_shape(lambda: layers(nnx.Rngs(1)))
    assert_same(fc.restore_train_state(tmp_path, abstract), state)


class Shown(nnx.Param):
    """Shows another value than it has."""

    def get_value(self, **kwargs: Any) -> Any:
        return super().get_value(**kwargs) * 2


def test_lists_in_variables_that_updates_turn_into_states(tmp_path: Path):
    """Which is what `nnx.update` does with the state of SM3."""
    state = train(create(tx=optax.sm3(1e-2)), 0, 2)
    restored = back(tmp_path, state, create(1, tx=optax.sm3(1e-2)))
    assert_same(train(restored, 2, 4), train(state, 2, 4))


def test_what_a_variable_has_is_saved_not_what_it_shows(tmp_path: Path):
    restored = back(tmp_path, nnx.Dict(w=Shown(jnp.ones(2))))
    assert restored.w.get_raw_value().tolist() == [1, 1]


class WithArray(nnx.Module):
    def __init__(self, keep: Any = lambda array: array):
        self.inner = nnx.Dict(w=nnx.Param(jnp.ones(2)))
        self.table = keep(jnp.arange(3))
        self.host = np.ones(3, np.float32)


def test_arrays_that_are_attributes(tmp_path: Path):
    state = WithArray()
    assert_same(back(tmp_path, state), state)
    abstract = nnx.eval_shape(lambda: WithArray(nnx.data))
    restored = fc.restore_train_state(tmp_path, abstract)
    assert restored.table.tolist() == [0, 1, 2]
    assert isinstance(restored.host, jax.Array), "as nnx.eval_shape says"
    for keep in (lambda array: array, lambda array: nnx.data([array])):
        abstract = nnx.eval_shape(lambda keep=keep: WithArray(keep))
        message = "table.* of the abstract state is an array .* make it a variable, or nnx.data"
        with pytest.raises(fc.errors.StateError, match=message):
            fc.restore_train_state(tmp_path, abstract)


def test_attributes_of_unknown_types(tmp_path: Path):
    state = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    state.settings = object()
    restored = back(tmp_path / "a", state)
    assert restored.settings is state.settings, "it is static, so it comes from `like`"
    state.odd = nnx.data(object())
    with pytest.raises(fc.errors.UnsupportedLeafError, match=r"arrays/odd: a builtins.object"):
        save(tmp_path / "b", state)


class Step(nnx.Variable):
    """Its name on disk is that of the optimizer's count."""


def test_two_values_of_one_name_are_refused(tmp_path: Path):
    net = nnx.Dict(w=nnx.Param(jnp.ones(2)), s=Step(jnp.ones(2)))
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    message = "two values of this state would both be saved as step"
    with pytest.raises(fc.errors.StateError, match=message):
        save(tmp_path, (net, optimizer))
    save(tmp_path, net)


def test_ctrl_c_does_not_save_a_module_that_may_be_half_updated(tmp_path: Path, caplog: Any):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(KeyboardInterrupt):
        interrupted(fc.CheckpointCallback(tmp_path, every_n_steps=100), model)
    assert "step 1 is not saved, since" in caplog.text
    assert os.listdir(tmp_path) == []


def interrupted(ckpt: fc.CheckpointCallback[Any], model: Any) -> None:
    with ckpt:
        ckpt.on_step_end(1, model)
        raise KeyboardInterrupt


def test_linen_params_go_into_an_nnx_module(tmp_path: Path):
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.encoder = nnx.Linear(2, 3, rngs=rngs)
            self.head = nnx.Linear(3, 1, rngs=rngs)

    params = nn.Sequential([nn.Dense(3)]).init(jax.random.key(1), jnp.ones((1, 2)))["params"]
    with fc.CheckpointCallback(tmp_path) as ckpt:
        ckpt.on_step_end(1, {"params": params})
    (name,) = params
    like = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(like))
    rename = {f"params/{name}": "params/encoder"}
    out = fc.restore(tmp_path, like, rename=rename, missing="keep")
    assert isinstance(out.state, Net)
    np.testing.assert_array_equal(out.state.encoder.kernel[...], params[name]["kernel"])
    np.testing.assert_array_equal(out.state.head.kernel[...], like.head.kernel[...])
    assert sorted(out.report.kept) == ["params/head/bias", "params/head/kernel"]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(like), before)
