"""What happens to runs that last: interruptions, restarts, other processes, failures on the way."""

import asyncio
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointExistsError, SaveFailedError, StateError
from flax_ckpt.format import checkpoint
from flax_ckpt.storage import commit, files
from flax_ckpt.training import steps
from tests.training.test_callback import Held, run, tree

INTERRUPTED = """
    import os, signal, sys, threading
    import numpy as np
    import flax_ckpt as fc
    from flax_ckpt.storage import files

    path, way = sys.argv[1:]
    sync, interrupted = files.sync_tree, threading.Event()

    def interrupt_then_sync(root):
        for _ in range(12):  # one that comes just before a lock is waited for is not seen
            os.kill(os.getpid(), signal.SIGINT)
            if interrupted.wait(5):
                break
        sync(root)

    files.sync_tree = interrupt_then_sync
    tree = {"w": np.arange(5.0)}
    try:
        if way == "save":
            fc.save(path, tree)
        else:
            fc.save_async(path, tree).result()
        while True:  # the signal comes at the next bytecode at the latest
            pass
    except KeyboardInterrupt:
        interrupted.set()
"""


@pytest.mark.parametrize("way", ["save", "result"])
def test_an_interrupt_while_waiting_does_not_end_the_save(tmp_path: Path, run_child: Any, way: str):
    run_child(INTERRUPTED, tmp_path / "ckpt", way)
    assert fc.load(tmp_path / "ckpt")["w"].tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_new_run_in_an_old_directory_keeps_its_own_steps(tmp_path: Path, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=50, keep_last=2) as ckpt:
        run(ckpt, 1, 101)
    with fc.CheckpointCallback(tmp_path, every_n_steps=7, keep_last=2, at_end=False) as ckpt:
        run(ckpt, 1, 31)
    assert steps.committed(str(tmp_path)) == [21, 28]
    assert "the later steps [50, 100] were moved to" in caplog.text
    assert len(list((tmp_path / "superseded").iterdir())) == 2


@pytest.fixture
def held() -> fc.Context:
    Held.release.clear()
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Held, checkpointable_name="params"
    )
    return context


def test_a_cell_that_runs_again_replaces_its_callback(tmp_path: Path, held: fc.Context):
    older = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=held)
    older.on_step_end(1, tree(1))
    threading.Timer(0.1, Held.release.set).start()
    newer = fc.CheckpointCallback(tmp_path, every_n_steps=1)
    assert newer.latest_step == 1, "it waited for the save in flight"
    with pytest.raises(fc.errors.StateError, match=f"replaced by a later one for {tmp_path}"):
        older.on_step_end(2, tree(2))
    older.close()
    newer.on_step_end(2, tree(2))
    newer.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_second_save_to_a_path_in_flight_is_refused(tmp_path: Path, held: fc.Context):
    with held:
        first = fc.save_checkpointables_async(tmp_path / "c", {"params": 1})
        with pytest.raises(CheckpointExistsError, match="is being saved right now"):
            fc.save(tmp_path / "c", {"w": 1})
        Held.release.set()
        first.result()


def test_threads_that_save_to_one_path_do_not_destroy_each_other(tmp_path: Path):
    outcomes: list[Any] = []

    def save(value: int) -> None:
        try:
            fc.save(tmp_path / "c", {"w": np.full(3, value)}, overwrite=True)
            outcomes.append(value)
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == list(range(6))
    assert len(set(fc.load(tmp_path / "c")["w"].tolist())) == 1
    assert os.listdir(tmp_path) == ["c"]


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = files.sync_tree, [OSError(28, "No space left on device")]

    def sync(root: str) -> None:
        if left:
            raise left.pop()
        real(root)

    monkeypatch.setattr(files, "sync_tree", sync)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_the_last_state_is_saved_though_an_earlier_save_failed(tmp_path, monkeypatch, on_error):
    fail_once(monkeypatch)
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=2, on_error=on_error)
    ckpt.on_step_end(2, tree(2))
    ckpt._saver.response.ended.wait()
    ckpt._seen = 3, tree(3), None
    if on_error == "raise":
        with pytest.raises(SaveFailedError, match=r"\(step 2\) was not saved: .*No space"):
            ckpt.close()
    else:
        ckpt.close()
    assert steps.committed(str(tmp_path)) == [3]


def test_a_step_that_cannot_be_deleted_does_not_stop_training(tmp_path, monkeypatch, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, keep_last=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
        ckpt.wait()

        def refuse(path: str) -> None:
            raise OSError(39, "Directory not empty")

        monkeypatch.setattr(commit, "remove", refuse)
        ckpt.on_step_end(2, tree(2))
    assert steps.committed(str(tmp_path)) == [1, 2]
    assert "step 1 could not be deleted" in caplog.text


def test_a_callback_of_the_users_that_fails_is_not_called_a_failed_save(tmp_path: Path):
    context = fc.Context()
    context.asynchronous.post_finalization_callback = lambda: 1 / 0
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=context)
    ckpt.on_step_end(1, tree(1))
    with pytest.raises(SaveFailedError, match="was saved, but what follows failed: ZeroDivision"):
        ckpt.close()
    assert ckpt.latest_step == 1
    ckpt.close()


def test_a_reader_beside_a_trainer_that_keeps_one_step_always_gets_one(tmp_path: Path):
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            out = fc.restore(tmp_path, tree(0))
            assert out.report.damaged == ()
            assert out.state["params"]["w"].tolist() == [out.step] * 3
            seen.append(out.step)

    with fc.CheckpointCallback(tmp_path, every_n_steps=1, keep_last=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
        ckpt.wait()
        reader = fc.AsyncResponse(read, "reader")
        run(ckpt, 2, 40)
        stop.set()
    reader.result()
    assert seen == sorted(seen)
    assert seen


def test_a_newer_format_is_no_damage(tmp_path: Path, caplog, monkeypatch):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
        ckpt.wait()
        monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
        ckpt.on_step_end(2, tree(2))
    monkeypatch.undo()
    with pytest.raises(fc.errors.FormatError, match="format version 2; .* use a newer flax_ckpt"):
        fc.restore(tmp_path, tree(0))
    assert "damaged" not in caplog.text


def test_the_wrong_class_for_the_config_is_no_damage(tmp_path: Path, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, config={"lr": 0.1}) as ckpt:
        ckpt.on_step_end(1, tree(1))
    with pytest.raises(fc.errors.FormatError, match="RunConfig"):
        fc.restore(tmp_path, tree(0), config=Duration)
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("wrong", [100.0, -1, "../y"])
def test_a_step_is_a_number_of_updates(tmp_path: Path, wrong: Any):
    ckpt = fc.CheckpointCallback(tmp_path / "run")
    with pytest.raises(StateError, match="a step is the number of completed updates"):
        ckpt.on_step_end(wrong, tree(0), force=True)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_jax_and_numpy_are_numbers_too(tmp_path: Path):
    ckpt = fc.CheckpointCallback(tmp_path)
    ckpt.on_step_end(jnp.int32(5), tree(5), force=True)
    ckpt.on_step_end(np.int64(6), tree(6), force=True)
    ckpt.close()
    assert steps.committed(str(tmp_path)) == [5, 6]


@pytest.mark.parametrize("wrong", [None, "3", 1 + 2j, {"a": 1}, object()])
def test_metrics_that_are_no_numbers_are_left_out_by_name(tmp_path: Path, wrong: Any, caplog: Any):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1), metrics={"loss": wrong, "accuracy": 1})
    assert fc.restore(tmp_path).metrics == {"accuracy": 1}
    assert re.search("not saved: metric 'loss' is .*: metrics are real numbers", caplog.text)


def test_metrics_keep_their_value(tmp_path: Path):
    metrics = {"a": jnp.bfloat16(0.5), "b": np.arange(2), "c": True, "d": 3}
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1), metrics=metrics)
    assert fc.restore(tmp_path, tree(0)).metrics == {"a": 0.5, "b": [0, 1], "c": True, "d": 3}


def test_a_donated_last_state_is_named_as_that(tmp_path: Path):
    step = jax.jit(lambda s: {**s, "step": s["step"] + 1}, donate_argnums=0)
    state = {"params": {"w": jnp.ones(3)}, "step": jnp.int32(1)}
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=100)
    ckpt.on_step_end(1, state)
    step(state)
    with pytest.raises(fc.errors.UnsupportedLeafError, match="was donated or deleted"):
        ckpt.close()


def test_a_part_that_is_none_is_left_out_and_comes_back_as_none(tmp_path: Path):
    state = {"params": {"w": np.ones(2)}, "opt_state": None, "step": 1}
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, state)
    back = fc.restore_train_state(tmp_path, state)
    assert back["opt_state"] is None
    assert back["step"] == 1


@pytest.mark.parametrize("wrong", [{"on_error": "rasie"}, {"keep_last": 0}, {"every_secs": 0}])
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: Any):
    with pytest.raises(ValueError, match="(on_error|every_secs|keep_last) must be"):
        fc.CheckpointCallback(tmp_path, **wrong)


def test_the_event_loop_that_the_caller_has_set_stays_set(tmp_path: Path):
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        fc.save(tmp_path / "c", {"w": 1})
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_a_relative_path_is_that_of_the_call(tmp_path: Path, monkeypatch):
    fc.save(tmp_path / "c", {"w": 1})
    monkeypatch.chdir(tmp_path)
    response = fc.load_async("c")
    monkeypatch.chdir("/")
    assert response.result() == {"w": 1}


def test_a_tree_that_is_too_deep_to_load_is_not_saved(tmp_path: Path):
    deep: Any = np.ones(1)
    for _ in range(300):
        deep = {"a": deep}
    with pytest.raises(fc.errors.UnsupportedLeafError, match="more than 256 levels deep"):
        fc.save(tmp_path / "c", deep)


@pytest.mark.parametrize("name", ["orbax.checkpoint", "_CHECKPOINT_METADATA", "flax_ckpt.json"])
def test_names_of_the_format_are_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="a file of the format"):
        fc.save_checkpointables(tmp_path / "c", {name: {"w": 1}})


def test_an_abstract_value_that_a_handler_does_not_take_is_refused(tmp_path: Path):
    fc.save_checkpointables(tmp_path / "c", {"config": Duration(seconds=1)})
    with pytest.raises(fc.errors.NotHandleableError, match="ProtoHandler does not load into 123"):
        fc.load_checkpointables(tmp_path / "c", {"config": 123})


def test_an_abstract_mesh_needs_a_mesh(tmp_path: Path):
    fc.save(tmp_path / "c", {"w": jnp.ones(8)})
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spec = jax.sharding.PartitionSpec("x")
    placed = jax.sharding.NamedSharding(mesh.abstract_mesh, spec)
    wish = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed)}
    with pytest.raises(StateError, match="no mesh is set: call this within jax.set_mesh"):
        fc.load(tmp_path / "c", wish)
    with jax.set_mesh(mesh):
        assert fc.load(tmp_path / "c", wish)["w"].sharding.spec == spec


def test_a_file_of_a_users_handler_is_checked_before_the_handler_reads_it(tmp_path, held):
    Held.release.set()
    with held:
        fc.save_checkpointables(tmp_path / "c", {"params": 1})
        (tmp_path / "c" / "params" / "done").write_text("y")
        with pytest.raises(fc.errors.DamagedCheckpointError, match="params/done: CRC-32C"):
            fc.load_checkpointables(tmp_path / "c", {"params": None})


def test_logging_is_quiet_by_default(tmp_path: Path, capfd):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
    shutil.rmtree(tmp_path / "1")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("flax_ckpt").handlers == []


def test_it_works_inside_a_running_event_loop(tmp_path: Path):
    async def cell() -> int:
        with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
            _, step = ckpt.restore_or_init(tree(0))
            ckpt.on_step_end(step + 1, tree(step + 1))
        found = fc.restore_train_state(tmp_path, tree(0))["params"]["w"]
        np.testing.assert_array_equal(found, tree(step + 1)["params"]["w"])
        return step + 1

    assert [asyncio.run(cell()), asyncio.run(cell())] == [1, 2]
