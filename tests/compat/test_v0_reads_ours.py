"""What we save, Orbax's older API reads: managers of steps, and readers of a single tree.

This process saves in each of our ways; another one, with eight devices, reads with every reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from tests.compat import trees
from tests.training.states import create

MODULE = "tests.compat.test_v0_reads_ours"
STEPS = (1, 2, 10)
LOSSES = {1: 0.5, 2: 0.125, 10: 0.25}
PARTS = ("params", "opt_state", "train_state")


def tree() -> dict[str, Any]:
    """What `StandardCheckpointer` can read, which knows no strings."""
    return {
        "w": jnp.asarray(trees.raw(1, "float32", (16, 6))),
        "sharded": trees.put(trees.raw(2, "bfloat16", (8, 6)), trees.mesh(4, 2), "x", "y"),
        "numpy": np.arange(5, dtype=np.int64),
        "n": 3,
        "nested": [jnp.asarray(7, jnp.int32), {"rate": 0.5}],
        "empty": {},
        "key": jax.random.key(3),
    }


def items() -> dict[str, Any]:
    return {"model": tree(), "words": {"a": "größer", "b": 1}, "message": Duration(seconds=3)}


def parts_of(state: Any) -> dict[str, Any]:
    rest = {"step": state.step, "batch_stats": state.batch_stats, "key": state.key}
    return {"params": state.params, "opt_state": state.opt_state, "train_state": rest}


def write(folder: Path) -> None:
    fc.save(folder / "saves" / "5", tree())
    fc.save(folder / "saves" / "7", tree())
    fc.save_checkpointables(folder / "items" / "3", items())
    with fc.CheckpointCallback(folder / "run", every_n_steps=1) as callback:
        for step in STEPS:
            state = create().replace(step=step)
            callback.on_step_end(step, state, metrics={"loss": LOSSES[step]})


# --- Orbax reads ----------------------------------------------------------------------------


def _v0() -> Any:
    import orbax.checkpoint as v0

    return v0


def read(folder: Path) -> trees.Results:
    found: trees.Results = {}
    for name, check in CHECKS.items():
        found[name] = trees.attempt(functools.partial(check, folder))
    return found


def _same(found: Any, expected: Any) -> list[str]:
    return trees.differences(found, expected)


def _placed(value: Any) -> Any:
    """The tree wanted on another mesh than it was saved on."""
    return trees.abstract(value, trees.other_mesh)


def _check_placed(found: Any, value: Any) -> list[str]:
    return _same(found, value) + trees.sharding_differences(
        found, trees.moved(value, trees.other_mesh)
    )


def _standard(folder: Path) -> list[str]:
    with _v0().StandardCheckpointer() as reader:
        return _same(reader.restore(folder / "saves" / "5" / "state"), trees.plain(tree()))


def _standard_target(folder: Path) -> list[str]:
    wanted = _concrete_numbers(_placed(tree()))
    with _v0().StandardCheckpointer() as reader:
        return _check_placed(reader.restore(folder / "saves" / "5" / "state", wanted), tree())


def _concrete_numbers(value: Any) -> Any:
    """v0 wants numbers, where v1 takes their types."""
    return jax.tree.map(lambda x: x(0) if isinstance(x, type) else x, value)


def _pytree(folder: Path) -> list[str]:
    with _v0().PyTreeCheckpointer() as reader:
        return _same(reader.restore(folder / "saves" / "5" / "state"), trees.plain(tree()))


def _pytree_target(folder: Path) -> list[str]:
    v0 = _v0()
    wanted = _concrete_numbers(_placed(tree()))
    how = v0.checkpoint_utils.construct_restore_args(wanted)
    with v0.PyTreeCheckpointer() as reader:
        path = folder / "saves" / "5" / "state"
        return _check_placed(reader.restore(path, item=wanted, restore_args=how), tree())


def _manager_of_saves(folder: Path) -> list[str]:
    v0 = _v0()
    args = v0.args.Composite(state=v0.args.StandardRestore(_concrete_numbers(_placed(tree()))))
    with v0.CheckpointManager(folder / "saves") as manager:
        wrong = _lists(manager, [5, 7])
        return wrong + _check_placed(manager.restore(7, args=args)["state"], tree())


def _manager_of_saves_without_args(folder: Path) -> list[str]:
    with _v0().CheckpointManager(folder / "saves") as manager:
        found = manager.restore(manager.latest_step())
    return _same(dict(found.items()), {"state": trees.plain(tree())})


def _composite(folder: Path) -> list[str]:
    v0 = _v0()
    args = v0.args.Composite(
        model=v0.args.StandardRestore(),
        words=v0.args.PyTreeRestore(),
        message=v0.args.ProtoRestore(Duration),
    )
    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as reader:
        found = dict(reader.restore(folder / "items" / "3", args=args).items())
    with v0.CheckpointManager(folder / "items") as manager:
        wrong = _lists(manager, [3])
        again = dict(manager.restore(3, args=args).items())
    for value in (found, again):
        wrong += [] if value.pop("message") == Duration(seconds=3) else ["another message"]
        wrong += _same(value, {"model": trees.plain(tree()), "words": items()["words"]})
    return wrong


def _lists(manager: Any, steps: list[int]) -> list[str]:
    listed = list(manager.all_steps()), manager.latest_step()
    return [] if listed == (steps, steps[-1]) else [f"lists {listed}"]


def _run(folder: Path) -> list[str]:
    v0 = _v0()
    options = v0.CheckpointManagerOptions(best_fn=lambda m: m["loss"], best_mode="min")
    with v0.CheckpointManager(folder / "run", options=options) as manager:
        wrong = _lists(manager, list(STEPS))
        wrong += [] if manager.best_step() == 2 else [f"best is {manager.best_step()}"]
        metrics = {step: manager.metrics(step)["loss"] for step in STEPS}
        wrong += [] if metrics == LOSSES else [f"metrics {metrics}"]
        described = manager.item_metadata(10)
        wrong += [] if set(PARTS) <= set(described.keys()) else [f"items {described}"]
    return wrong


def _run_standard(folder: Path) -> list[str]:
    v0 = _v0()
    wanted = parts_of(create().replace(step=10))
    args = {
        name: v0.args.StandardRestore(_concrete_numbers(_placed(part)))
        for name, part in wanted.items()
    }
    with v0.CheckpointManager(folder / "run") as manager:
        found = manager.restore(10, args=v0.args.Composite(**args))
    return _check_placed({name: found[name] for name in PARTS}, wanted)


def _run_pytree(folder: Path) -> list[str]:
    v0 = _v0()
    wanted = parts_of(create().replace(step=2))
    args = {name: v0.args.PyTreeRestore() for name in PARTS}
    with v0.CheckpointManager(folder / "run") as manager:
        found = manager.restore(2, args=v0.args.Composite(**args))
    return _same(
        {name: found[name] for name in PARTS},
        {name: trees.plain(part) for name, part in wanted.items()},
    )


def _run_without_args(folder: Path) -> list[str]:
    wanted = parts_of(create().replace(step=10))
    with _v0().CheckpointManager(folder / "run") as manager:
        found = manager.restore(10)
    return _same(
        {name: found[name] for name in PARTS},
        {name: trees.plain(part) for name, part in wanted.items()},
    )


def _run_goes_on(folder: Path) -> list[str]:
    """A manager saves the next step into the root of our run; we read it in turn."""
    v0 = _v0()
    parts = parts_of(create().replace(step=11))
    args = {name: v0.args.StandardSave(part) for name, part in parts.items()}
    with v0.CheckpointManager(folder / "run") as manager:
        manager.save(11, args=v0.args.Composite(**args))
        return _lists(manager, [*STEPS, 11])


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    check.__name__.strip("_"): check
    for check in (
        *(_standard, _standard_target, _pytree, _pytree_target, _manager_of_saves, _composite),
        *(_manager_of_saves_without_args, _run, _run_standard, _run_pytree, _run_without_args),
        _run_goes_on,  # the last: it adds a step
    )
}
ROLES: dict[str, trees.Role] = {"read": read}


# --- the tests ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v0_reads")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> trees.Results:
    return trees.run(MODULE, folder, ["read"])


@pytest.mark.parametrize("check", CHECKS)
def test_v0_reads_it(results: trees.Results, check: str) -> None:
    assert results[check] == []


def test_we_read_a_step_that_v0_added(folder: Path, results: trees.Results) -> None:
    assert results["run_goes_on"] == []
    out = fc.restore(folder / "run", create())
    assert out.step == 11
    assert trees.differences(parts_of(out.state), parts_of(create().replace(step=11))) == []


if __name__ == "__main__":
    trees.main(ROLES)
