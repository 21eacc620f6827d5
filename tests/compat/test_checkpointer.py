"""Runs that one library begins and the other reads, lists, thins out and goes on with."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc

# Orbax says so whenever it is not told where arrays shall lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

LOSSES = {1: 0.5, 2: 0.1, 3: 0.9}


def tree(step: int) -> Any:
    return {"w": np.full(3, step), "b": jnp.ones(2) * step, "n": step}


def check(found: Any, step: int) -> None:
    np.testing.assert_array_equal(found["w"], np.full(3, step))
    np.testing.assert_array_equal(found["b"], np.ones(2) * step)
    assert found["n"] == step


def names(module: Any, form: str) -> Any:
    steps = module.path.step
    options = {"step_prefix": "step", "step_format_fixed_length": 4}
    padded, plain = steps.standard_name_format(**options), steps.standard_name_format()
    formats = {"plain": None, "padded": padded}
    return (
        formats[form] if form in formats else steps.composite_name_format(padded, [plain, padded])
    )


def fill(module: Any, root: Path, form: str = "plain") -> None:
    with module.training.Checkpointer(
        root, step_name_format=names(module, form), custom_metadata={"run": "größer"}
    ) as checkpointer:
        for step, loss in LOSSES.items():
            metrics = {"loss": loss, "by": {"class": [1.0, 2.0]}}
            own = {"step": step}
            assert checkpointer.save(step, tree(step), metrics=metrics, custom_metadata=own)


BOTH = pytest.mark.parametrize(
    ("writer", "reader"), [(fc, ocp), (ocp, fc)], ids=["orbax_reads", "ours_reads"]
)


@BOTH
@pytest.mark.parametrize("form", ["plain", "padded", "composite"])
def test_a_run_is_listed_and_loaded(tmp_path: Path, writer: Any, reader: Any, form: str):
    fill(writer, tmp_path, form)
    with reader.training.Checkpointer(
        tmp_path, step_name_format=names(reader, form)
    ) as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [1, 2, 3]
        assert [c.metrics["loss"] for c in checkpointer.checkpoints] == list(LOSSES.values())
        times = [c.time for c in checkpointer.checkpoints]
        assert times == sorted(times)
        assert all(time.tzinfo is not None for time in times)
        assert checkpointer.root_metadata().custom_metadata == {"run": "größer"}
        abstract = {**tree(0), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
        for step in LOSSES:
            check(checkpointer.load(step), step)
            found = checkpointer.metadata(step)
            assert (found.step, found.custom_metadata) == (step, {"step": step})
            assert found.init_timestamp <= found.commit_timestamp
            assert found.metadata["b"].shape == (2,)
        check(checkpointer.load(None, abstract), 3)
        assert sorted(checkpointer.load_checkpointables(2)) == ["state"]
        assert sorted(checkpointer.checkpointables_metadata(2).metadata) == ["state"]


@BOTH
def test_a_run_goes_on_and_is_thinned_out_by_its_metrics(tmp_path: Path, writer: Any, reader: Any):
    fill(writer, tmp_path)
    keep = reader.training.preservation_policies
    best = keep.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)
    policy = keep.AnyPreservationPolicy([keep.LatestN(1), best])
    decide = reader.training.save_decision_policies
    with reader.training.Checkpointer(
        tmp_path, preservation_policy=policy, save_decision_policy=decide.FixedIntervalPolicy(2)
    ) as checkpointer:
        saved = [s for s in range(4, 7) if checkpointer.save(s, tree(s), metrics={"loss": 0.3})]
        assert saved == [4, 6]
        assert [c.step for c in checkpointer.checkpoints] == [2, 6]
    with writer.training.Checkpointer(tmp_path) as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [2, 6]
        assert [c.metrics["loss"] for c in checkpointer.checkpoints] == [0.1, 0.3]
        check(checkpointer.load(), 6)
        assert checkpointer.save(7, tree(7), metrics={"loss": 0.7})
        checkpointer.delete(2)
        assert [c.step for c in checkpointer.checkpoints] == [6, 7]
    assert sorted(os.listdir(tmp_path)) == ["6", "7", "metadata"]


def test_steps_of_orbax_are_what_the_format_says(tmp_path: Path):
    fill(ocp, tmp_path)
    there = os.listdir(tmp_path / "1")
    assert "orbax.checkpoint" not in there, "as the manager of v0 writes them"
    assert (tmp_path / "1" / "state" / "commit_success.txt").exists()


def test_orbax_removes_what_a_killed_save_of_ours_left(tmp_path: Path):
    fill(fc, tmp_path)
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with ocp.training.Checkpointer(tmp_path, cleanup_tmp_directories=True) as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [1, 2, 3]
        checkpointer.save(4, tree(4))
    assert not (tmp_path / "9.orbax-checkpoint-tmp").exists()


def test_ours_removes_what_a_killed_save_of_orbax_left(tmp_path: Path, run_child: Any):
    program = """
        import os, sys
        import numpy as np
        import orbax.checkpoint.experimental.v1 as ocp
        from orbax.checkpoint._src.path import atomicity
        checkpointer = ocp.training.Checkpointer(sys.argv[1])
        checkpointer.save(1, {"a": np.ones(3)})
        async def die(self, *args, **kwargs): os._exit(9)
        atomicity.AtomicRenameTemporaryPath.finalize = die
        checkpointer.save(2, {"a": np.ones(3)})
    """
    assert run_child(program, tmp_path, check=False).returncode == 9
    assert sorted(os.listdir(tmp_path)) == ["1", "2.orbax-checkpoint-tmp"]
    with fc.training.Checkpointer(tmp_path, cleanup_tmp_directories=True) as checkpointer:
        assert [c.step for c in checkpointer.checkpoints] == [1]
        assert checkpointer.save(2, tree(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_the_manager_of_v0_lists_and_restores_ours(tmp_path: Path):
    fill(fc, tmp_path)
    options = v0.CheckpointManagerOptions(best_fn=lambda m: m["loss"], best_mode="min")
    with v0.CheckpointManager(tmp_path, options=options) as manager:
        assert sorted(manager.all_steps()) == [1, 2, 3]
        assert (manager.latest_step(), manager.best_step()) == (3, 2)
        check(manager.restore(2)["state"], 2)
        assert manager.metrics(1)["loss"] == 0.5
        assert manager.metadata().custom_metadata == {"run": "größer"}
    for args in (v0.args.StandardRestore(tree(0)), v0.args.PyTreeRestore(tree(0))):
        with v0.CheckpointManager(tmp_path) as manager:
            found = manager.restore(3, args=v0.args.Composite(state=args))
            check(found["state"], 3)


def test_steps_of_the_manager_of_v0(tmp_path: Path):
    with v0.CheckpointManager(tmp_path / "default") as manager:
        manager.save(1, args=v0.args.StandardSave({"w": np.ones(3)}))
        manager.wait_until_finished()
    with v0.CheckpointManager(tmp_path / "items") as manager:
        args = {"params": v0.args.PyTreeSave(tree(2)), "notes": v0.args.JsonSave({"a": [1]})}
        manager.save(2, args=v0.args.Composite(**args), custom_metadata={"own": 1})
        manager.wait_until_finished()
    with fc.training.Checkpointer(tmp_path / "default") as checkpointer:
        found = checkpointer.load(1, checkpointable_name="default")
        np.testing.assert_array_equal(found["w"], np.ones(3))
        np.testing.assert_array_equal(
            checkpointer.load(1, checkpointable_name="AUTO")["w"], [1] * 3
        )
        assert checkpointer.checkpoints[0].metrics is None
    with fc.training.Checkpointer(tmp_path / "items") as checkpointer:
        parts = checkpointer.load_checkpointables()
        check(parts["params"], 2)
        assert parts["notes"] == {"a": [1]}
        assert checkpointer.latest.custom_metadata == {"own": 1}


def test_a_callback_goes_on_with_a_run_of_the_checkpointer_and_back(tmp_path: Path):
    state = {"params": {"w": np.ones(2)}}
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, keep_last=2) as callback:
        for step in (1, 2, 3):
            callback.on_step_end(step, state, metrics={"loss": step})
    with fc.training.Checkpointer(tmp_path) as checkpointer:
        assert [(c.step, c.metrics) for c in checkpointer.checkpoints] == [
            (2, {"loss": 2.0}),
            (3, {"loss": 3.0}),
        ]
        checkpointer.save_checkpointables(4, state)
    assert fc.restore(tmp_path, state).step == 4
