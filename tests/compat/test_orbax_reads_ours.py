"""What we save, stock Orbax loads: every tree of the catalogue, and steps of a training run.

One process writes with `flax_ckpt`, others read with Orbax; each compares with its own copy of
the trees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import flax_ckpt as fc
from flax_ckpt.adapters import config as configs
from flax_ckpt.format.config_pb import RunConfig
from tests.compat import trees

MODULE = "tests.compat.test_orbax_reads_ours"
STEPS = (1, 2, 10)
RUNS = ("full", "sgd", "identity", "no_params", "words", "dict")
CONFIG = {"learning_rate": 1e-3, "layers": (3, 4), "name": "größer"}


# --- what is written ------------------------------------------------------------------------


class State(TrainState):
    batch_stats: Any
    rng: jax.Array


@flax.struct.dataclass
class Words:
    params: Any
    opt_state: Any
    names: Any


def _train_state(params: Any, tx: optax.GradientTransformation) -> State:
    stats = {"bn": {"mean": jnp.full((3,), 0.5)}}
    rng = jax.random.key(3)
    return State.create(apply_fn=max, params=params, tx=tx, batch_stats=stats, rng=rng)


def _stepped(tx: optax.GradientTransformation) -> State:
    state = _train_state({"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}, tx)
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))


def states() -> dict[str, Any]:
    """Training states, by the name of their run; the odd ones have parts without leaves."""
    return {
        "full": _stepped(optax.adamw(1e-3)),
        "sgd": _stepped(optax.sgd(0.1)),
        "identity": _stepped(optax.identity()),
        "no_params": _train_state({}, optax.adam(1e-3)),
        "words": Words({"w": jnp.ones(2)}, (), {"a": "x", "b": ["y"]}),
        "dict": {"params": {"w": jnp.ones(2)}, "step": 3, "ema": {"w": np.ones(2)}},
    }


def parts_of(state: Any) -> dict[str, Any]:
    """What a step has of a state, said again."""
    if isinstance(state, dict):
        rest = {name: state[name] for name in ("step", "ema")}
        return {"params": state["params"], "train_state": rest}
    parts = {"params": state.params, "opt_state": state.opt_state}
    if isinstance(state, Words):
        return parts | {"train_state": {"names": state.names}}
    rest = {"step": state.step, "batch_stats": state.batch_stats, "rng": state.rng}
    return parts | {"train_state": rest}


def write(folder: Path) -> trees.Results:
    work = {c.name: functools.partial(_save, folder, c) for c in trees.CASES.values()}
    found = {f"save {name}": trees.attempt(check) for name, check in work.items()}
    jax.config.update("jax_enable_x64", False)
    for name, state in states().items():
        done = trees.attempt(functools.partial(_train, folder / f"run_{name}", state))
        found[f"save run_{name}"] = done
    return found


def _save(folder: Path, case: trees.Case) -> list[str]:
    context = fc.Context()
    context.array.saving.storage_options.chunk_byte_size = case.chunk_bytes
    with context:
        fc.save(folder / case.name, case.tree())
    return []


def _train(root: Path, state: Any) -> list[str]:
    config = CONFIG if root.name == "run_full" else None
    with fc.CheckpointCallback(root, every_n_steps=1, config=config) as callback:
        for step in STEPS:
            callback.on_step_end(step, state, metrics={"loss": 0.25 * step})
    return []


# --- Orbax reads ----------------------------------------------------------------------------


def _v1() -> Any:
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


def _as_saved(path: Path, name: str) -> list[str]:
    """`load` without a target: values, structure, and where the arrays are."""
    expected = trees.plain(trees.CASES[name].tree())
    found = _v1().load(path)
    return trees.differences(found, expected) or trees.sharding_differences(found, expected)


def _items(path: Path, name: str) -> list[str]:
    """`load_checkpointables` of everything, and of the one by name."""
    expected = {"state": trees.plain(trees.CASES[name].tree())}
    everything = _v1().load_checkpointables(path)
    named = _v1().load_checkpointables(path, {"state": None})
    return trees.differences(everything, expected) + trees.differences(named, expected)


def _wished(path: Path, name: str) -> list[str]:
    """`load` into a tree of `ShapeDtypeStruct` without shardings."""
    expected = trees.scalars_as_arrays(trees.CASES[name].tree())
    found = _v1().load(path, trees.abstract(expected))
    return trees.differences(found, expected) or trees.sharding_differences(found, expected)


def _placed(path: Path, name: str) -> list[str]:
    """`load` into a tree of `ShapeDtypeStruct` on another mesh than they were saved on."""
    expected = trees.scalars_as_arrays(trees.CASES[name].tree())
    found = _v1().load(path, trees.abstract(expected, trees.other_mesh))
    moved = trees.moved(expected, trees.other_mesh)
    return trees.differences(found, expected) or trees.sharding_differences(found, moved)


def _pytree_v0(path: Path, name: str) -> list[str]:
    """The older API: `PyTreeCheckpointer().restore` of the directory of the tree."""
    import orbax.checkpoint as v0

    expected = trees.plain(trees.CASES[name].tree())
    with v0.PyTreeCheckpointer() as reader:
        return trees.differences(reader.restore(path / "state"), expected)


MODES: dict[str, Callable[[Path, str], list[str]]] = {
    "as_saved": _as_saved,
    "items": _items,
    "wished": _wished,
    "placed": _placed,
    "pytree_v0": _pytree_v0,
}


def _reader(*modes: str) -> trees.Role:
    def read(folder: Path) -> trees.Results:
        return {
            f"{mode}-{name}": trees.attempt(lambda m=mode, n=name: MODES[m](folder / n, n))
            for name in trees.CASES
            for mode in modes
        }

    return read


def training(folder: Path) -> trees.Results:
    """Steps of runs: each part by name, metrics, the config, and the lists of steps."""
    found: trees.Results = {}
    for name, state in states().items():
        root, parts = folder / f"run_{name}", parts_of(state)
        for kind, check in _TRAINING_CHECKS.items():
            found[f"run_{name}-{kind}"] = trees.attempt(lambda c=check, r=root, p=parts: c(r, p))
    return found | {"config": trees.attempt(lambda: _config(folder / "run_full" / "2"))}


def _config(path: Path) -> list[str]:
    """Orbax loads the config when given the class of its message."""
    found = _v1().load_checkpointables(path, {"config": RunConfig})
    same = list(found["config"].item) == list(configs.to_message(CONFIG).item)
    return [] if same and found["config"].provenance else [f"the config is {found}"]


def _by_name(root: Path, parts: dict[str, Any]) -> list[str]:
    found = _v1().load_checkpointables(root / "10", dict.fromkeys(parts))
    return trees.differences(found, {name: trees.plain(part) for name, part in parts.items()})


def _by_wish(root: Path, parts: dict[str, Any]) -> list[str]:
    found = _v1().load_checkpointables(root / "2", trees.abstract(parts, trees.first_device))
    return trees.differences(found, parts)


def _each_part(root: Path, parts: dict[str, Any]) -> list[str]:
    wrong: list[str] = []
    for name, part in parts.items():
        found = _v1().load(root / "1", checkpointable_name=name)
        wrong += trees.differences(found, trees.plain(part))
    return wrong


def _all(root: Path, parts: dict[str, Any]) -> list[str]:
    """Everything at once, but for a config, which Orbax loads only with its class given."""
    wanted = None
    if (root / "1" / "config").exists():
        wanted = dict.fromkeys(parts) | {"config": RunConfig}
    found = _v1().load_checkpointables(root / "1", wanted)
    found.pop("config", None)
    return trees.differences(found, {name: trees.plain(part) for name, part in parts.items()})


def _checkpointer_v1(root: Path, parts: dict[str, Any]) -> list[str]:
    with _v1().training.Checkpointer(root) as reader:
        listed = [c.step for c in reader.checkpoints]
        metrics = [c.metrics for c in reader.checkpoints]
        found = reader.load_checkpointables(10, dict.fromkeys(parts))
    wrong = trees.differences(found, {name: trees.plain(part) for name, part in parts.items()})
    wrong += [] if sorted(listed) == list(STEPS) else [f"lists the steps {listed}"]
    expected = [{"loss": 0.25 * step} for step in listed]
    return wrong + ([] if metrics == expected else [f"lists the metrics {metrics}"])


def _manager_v0(root: Path, parts: dict[str, Any]) -> list[str]:
    import orbax.checkpoint as v0

    with v0.CheckpointManager(root) as manager:
        listed, latest = list(manager.all_steps()), manager.latest_step()
        wanted = {name: v0.args.PyTreeRestore() for name in parts}
        found = manager.restore(10, args=v0.args.Composite(**wanted))
        metrics = manager.metrics(2)
    expected = {name: trees.plain(part) for name, part in parts.items()}
    wrong = trees.differences({name: found[name] for name in parts}, expected)
    wrong += [] if metrics == {"loss": 0.5} else [f"has the metrics {metrics}"]
    return wrong + ([] if (listed, latest) == (list(STEPS), 10) else [f"lists {listed}, {latest}"])


_TRAINING_CHECKS = {
    "by_name": _by_name,
    "by_wish": _by_wish,
    "each_part": _each_part,
    "all": _all,
    "checkpointer_v1": _checkpointer_v1,
    "manager_v0": _manager_v0,
}


ROLES: dict[str, trees.Role] = {
    "write": write,
    "read_1": _reader("as_saved", "items", "pytree_v0"),
    "read_2": trees.both(_reader("wished", "placed"), training),
}
WAVES = ("write",), ("read_1", "read_2")


# --- the tests ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> trees.Results:
    return trees.run(MODULE, tmp_path_factory.mktemp("ours"), *WAVES)


@pytest.mark.parametrize("name", [*trees.CASES, *(f"run_{run}" for run in RUNS)])
def test_we_save(results: trees.Results, name: str) -> None:
    assert results[f"save {name}"] == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", trees.CASES)
def test_orbax_loads_it(results: trees.Results, name: str, mode: str) -> None:
    assert results[f"{mode}-{name}"] == []


@pytest.mark.parametrize("check", _TRAINING_CHECKS)
@pytest.mark.parametrize("run", RUNS)
def test_orbax_loads_a_training_step(results: trees.Results, run: str, check: str) -> None:
    assert results[f"run_{run}-{check}"] == []


def test_orbax_loads_the_config(results: trees.Results) -> None:
    assert results["config"] == []


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)},
        {"a": [jnp.ones(2)], "a.0": jnp.zeros(2)},
        {"end": jnp.ones(2), "end/": jnp.zeros(2)},
        {"": {"": jnp.ones(2)}, ".": jnp.zeros(2)},
        {"": jnp.ones(2), "/": jnp.zeros(2)},
    ],
    ids=["dot", "index", "slash", "empty", "only_slash"],
)
def test_names_that_orbax_takes_for_one_are_refused(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(fc.errors.DuplicateNameError, match="under one name"):
        fc.save(tmp_path / "ckpt", tree)


if __name__ == "__main__":
    trees.main(ROLES)
