"""`training.Checkpointer`: what it saves, lists, loads, keeps and says."""

import datetime
import inspect
import json
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt.format.names import LOCK
from flax_ckpt.storage.commit import Staging
from flax_ckpt.training import Checkpointer
from tests.training.test_callback import Held, RefusingHandler

decide = fc.training.save_decision_policies
preserve = fc.training.preservation_policies


def tree(step: int) -> Any:
    return {"w": np.full(3, step), "b": jnp.ones(2) * step}


def steps_of(checkpointer: Checkpointer) -> list[int]:
    return [checkpoint.step for checkpoint in checkpointer.checkpoints]


def with_handler(handler: type) -> fc.Context:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        handler, checkpointable_name="state"
    )
    return context


@pytest.fixture
def held():
    """A context in which saves wait until `release` is set."""
    Held.release = threading.Event()
    yield with_handler(Held)
    Held.release.set()


# --- saving and loading --------------------------------------------------------------------


def entries(root: Path) -> list[str]:
    """What is in the root of a run, but for the lock of one that is open."""
    return [name for name in os.listdir(root) if name != LOCK]


def test_what_was_saved_is_loaded_by_number_by_metadata_and_the_latest(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest is None
        for step in (3, 5):
            assert checkpointer.save(step, tree(step), metrics={"loss": 1 / step}) is True
        first, latest = checkpointer.checkpoints
        assert (first.step, latest.step) == (3, checkpointer.latest.step)
        np.testing.assert_array_equal(checkpointer.load()["w"], [5, 5, 5])
        np.testing.assert_array_equal(checkpointer.load(3)["w"], [3, 3, 3])
        np.testing.assert_array_equal(checkpointer.load(first)["w"], [3, 3, 3])
        abstract = {"b": jax.ShapeDtypeStruct((2,), jnp.float16), "w": None}
        wanted = {**abstract, "w": np.zeros(3, np.int64)}
        assert checkpointer.load(3, wanted)["b"].dtype == jnp.float16
        assert checkpointer.load_async(3).result()["w"].tolist() == [3, 3, 3]
        parts = checkpointer.load_checkpointables_async(3).result()
        assert sorted(parts) == ["state"]
    assert sorted(entries(tmp_path)) == ["3", "5"]


def test_checkpointables(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        parts = {"params": tree(1), "extra": {"n": 7}}
        assert checkpointer.save_checkpointables(1, parts, custom_metadata={"note": "x"})
        assert checkpointer.load_checkpointables(1, {"extra": None}) == {"extra": {"n": 7}}
        assert sorted(checkpointer.load_checkpointables()) == ["extra", "params"]
        assert checkpointer.load(1, checkpointable_name="extra") == {"n": 7}
        assert checkpointer.save(2, tree(2), checkpointable_name="model")
        assert checkpointer.load(2, checkpointable_name="AUTO")["w"].tolist() == [2, 2, 2]
        described = checkpointer.checkpointables_metadata(1)
        assert sorted(described.metadata) == ["extra", "params"]
        assert described.custom_metadata == {"note": "x"}
        with pytest.raises(fc.errors.CheckpointNotFoundError, match="no checkpointable 'state'"):
            checkpointer.load(2)
        with pytest.raises(fc.errors.CheckpointNotFoundError, match="no checkpointable 'state'"):
            checkpointer.load_async(2).result()


@pytest.mark.parametrize("name", ["metrics", "AUTO", "", "_CHECKPOINT_DELETION"])
def test_reserved_names_are_refused(tmp_path: Path, name: str):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="is a reserved name"),
    ):
        checkpointer.save_checkpointables(1, {name: tree(1)})
    assert entries(tmp_path) == []


def test_metadata_of_a_step(tmp_path: Path):
    before = datetime.datetime.now(datetime.UTC)
    with Checkpointer(tmp_path) as checkpointer:
        loss = jnp.float32(0.5)
        metrics = {"loss": loss, "per": {"class": np.array([1, 2])}, "note": "é", "none": None}
        checkpointer.save(3, tree(3), metrics=metrics, custom_metadata={"a": 1})
        saved = {"loss": 0.5, "per": {"class": [1, 2]}, "note": "é", "none": None}
        described, listed = checkpointer.metadata(), checkpointer.latest
        assert listed is not None
        for found in (described, listed):
            assert isinstance(found, fc.training.CheckpointMetadata)
            assert isinstance(found, fc.CheckpointMetadata)
            assert (found.step, found.metrics, found.custom_metadata) == (3, saved, {"a": 1})
            assert before <= found.init_timestamp <= found.commit_timestamp == found.time
        assert described.metadata["b"].shape == (2,)
        assert fc.restore(tmp_path, step=listed).report.loaded
        loaded = checkpointer.load(3, described)
        np.testing.assert_array_equal(loaded["b"], [3, 3])
    assert json.loads((tmp_path / "3" / "metrics" / "metrics").read_text()) == saved


def test_metrics_that_json_cannot_hold_are_refused(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(fc.errors.StateError, match="metric 'a/b' is .*: metrics are real num"):
            checkpointer.save(1, tree(1), metrics={"a": {"b": np.complex64(1)}})
        with pytest.raises(fc.errors.NotHandleableError, match="'metrics': JSON cannot hold it"):
            checkpointer.save(1, tree(1), metrics={"a": {1, 2}})
        assert checkpointer.save(1, tree(1)), "nothing was begun"


def test_a_step_that_is_there_is_not_saved_again_unless_overwritten(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, tree(3), metrics={"loss": 1})
        with pytest.raises(fc.training.errors.StepAlreadyExistsError) as caught:
            checkpointer.save(3, tree(4))
        assert f"step 3 is saved already, at {tmp_path}/3; pass overwrite=True" in str(caught.value)
        assert isinstance(caught.value, FileExistsError)
        assert (caught.value.step, caught.value.path) == (3, f"{tmp_path}/3")
        assert checkpointer.load(3)["w"].tolist() == [3, 3, 3]
        assert checkpointer.save(3, tree(4), overwrite=True, metrics={"loss": 2})
        assert checkpointer.load(3)["w"].tolist() == [4, 4, 4]
        assert checkpointer.latest.metrics == {"loss": 2}
        checkpointer.save_async(5, tree(5))
        with pytest.raises(fc.training.errors.StepAlreadyExistsError):
            checkpointer.save_async(5, tree(5))
    assert sorted(entries(tmp_path)) == ["3", "5"]


def test_steps_that_are_not_there_are_named_beside_those_that_are(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(fc.training.errors.StepNotFoundError) as caught:
            checkpointer.load()
        assert str(caught.value) == f"{tmp_path} has no step; its steps: none"
        checkpointer.save(3, tree(3))
        for call in (checkpointer.load, checkpointer.metadata, checkpointer.delete):
            with pytest.raises(FileNotFoundError, match="has no step 7; its steps: 3") as caught:
                call(7)
        assert (caught.value.step, caught.value.path) == (7, f"{tmp_path}/7")


@pytest.mark.parametrize("wrong", [-1, "3", 1.5, True])
def test_what_is_no_step_is_refused(tmp_path: Path, wrong: Any):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(fc.errors.StateError, match="a step is the number of completed updates"),
    ):
        checkpointer.save(wrong, tree(1))


# --- when it saves ---------------------------------------------------------------------------


def test_the_policy_decides_unless_forced(tmp_path: Path):
    policy = decide.FixedIntervalPolicy(3)
    with Checkpointer(tmp_path, save_decision_policy=policy) as checkpointer:
        assert [s for s in range(1, 8) if checkpointer.should_save(s)] == [3, 6]
        assert [s for s in range(1, 8) if checkpointer.save(s, tree(s))] == [3, 6]
        assert checkpointer.save_async(8, tree(8)) is None
        assert checkpointer.save_checkpointables_async(8, {"state": tree(8)}) is None
        assert checkpointer.save_checkpointables(8, {"state": tree(8)}) is False
        assert checkpointer.save(8, tree(8), force=True)
        assert not checkpointer.should_save(6), "earlier than the latest"
    assert steps_of(checkpointer) == [3, 6, 8]


def test_without_a_policy_it_saves_when_nothing_is_in_flight(tmp_path: Path, held: fc.Context):
    with Checkpointer(tmp_path, context=held) as checkpointer:
        assert checkpointer.save_async(1, {}) is not None
        assert checkpointer.is_saving_in_progress()
        assert not checkpointer.should_save(2)
        assert checkpointer.save_async(2, {}) is None
        assert steps_of(checkpointer) == [], "it is not committed"
        Held.release.set()
        checkpointer.wait()
        assert not checkpointer.is_saving_in_progress()
        assert checkpointer.save(3, {})
    assert steps_of(checkpointer) == [1, 3]


def test_a_due_save_waits_for_the_one_in_flight(tmp_path: Path, held: fc.Context):
    policy = decide.FixedIntervalPolicy(1)
    with Checkpointer(tmp_path, context=held, save_decision_policy=policy) as checkpointer:
        first = checkpointer.save_async(1, {})
        threading.Timer(0.1, Held.release.set).start()
        second = checkpointer.save_async(2, {})
        assert first.done()
        assert 1 in steps_of(checkpointer)
        assert second.result() is True


def test_policies_see_what_is_on_disk_and_what_is_in_flight(tmp_path: Path):
    seen: list[tuple[list[int], bool]] = []

    class Policy:
        def should_save(self, step, previous_steps, *, context):
            assert step.time.tzinfo is not None
            assert all(previous.time <= step.time for previous in previous_steps)
            seen.append(([p.step for p in previous_steps], context.reached_preemption))
            return True

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree(1))
    with Checkpointer(tmp_path, save_decision_policy=Policy()) as checkpointer:
        checkpointer.save_async(2, tree(2))
        checkpointer.save(3, tree(3))
    assert seen == [([1], False), ([1, 2], False)]


def test_policies_see_the_metrics_of_the_save_and_not_of_what_it_replaces(tmp_path: Path):
    seen: list[Any] = []

    class Policy:
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            seen.append((step.metrics, [other.metrics for other in previous_steps]))
            return True

    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics").write_text('{"of": "something else"}')
    with Checkpointer(tmp_path, save_decision_policy=Policy()) as checkpointer:
        checkpointer.save(1, tree(1), metrics={"loss": 1})
        saving = checkpointer.save_async(1, tree(2), overwrite=True)
        checkpointer.should_save(2)
        assert saving is not None
        assert saving.result()
        checkpointer.should_save(3)
    assert seen == [(None, []), (None, []), (None, [None]), (None, [None])]


def test_reload_tells_the_policies_of_other_writers(tmp_path: Path):
    one = Checkpointer(tmp_path, save_decision_policy=decide.FixedIntervalPolicy(1))
    assert one.should_save(1)
    with Checkpointer(tmp_path) as other:
        other.save(4, tree(4))
    assert one.latest.step == 4
    one.reload()
    assert not one.should_save(3)
    assert one.should_save(5)


# --- what it keeps ---------------------------------------------------------------------------


def test_best_and_latest_are_kept(tmp_path: Path):
    best = preserve.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=2)
    policy = preserve.AnyPreservationPolicy([preserve.LatestN(1), best])
    losses = {1: 0.5, 2: 0.1, 3: float("nan"), 4: 0.9, 5: 0.2, 6: 0.8}
    for steps in ((1, 2, 3), (4, 5, 6)):  # the second learns of the first from disk
        with Checkpointer(tmp_path, preservation_policy=policy) as checkpointer:
            for step in steps:
                checkpointer.save(step, tree(step), metrics={"loss": losses[step]})
    assert steps_of(checkpointer) == [2, 5, 6]
    assert sorted(entries(tmp_path)) == ["2", "5", "6"]


def test_the_step_just_saved_stays_whatever_the_policy_says(tmp_path: Path):
    with Checkpointer(tmp_path, preservation_policy=preserve.LatestN(0)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tree(step))
            assert steps_of(checkpointer) == [step]


def test_metrics_that_are_damaged_do_not_stop_a_run(tmp_path: Path, caplog):
    best = preserve.BestN(get_metric_fn=lambda m: m["loss"], n=1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree(1), metrics={"loss": 1})
    (tmp_path / "1" / "metrics" / "metrics").write_text("{")
    with Checkpointer(tmp_path, preservation_policy=best) as checkpointer:
        checkpointer.save(2, tree(2), metrics={"loss": 2})
    assert f"the metrics of {tmp_path}/1 cannot be read" in caplog.text
    assert steps_of(checkpointer) == [1, 2]


def test_a_policy_that_fails_is_told_after_the_save(tmp_path: Path):
    best = preserve.BestN(get_metric_fn=lambda m: m["loss"], n=1)
    checkpointer = Checkpointer(tmp_path, preservation_policy=best)
    checkpointer.save(1, tree(1), metrics={"accuracy": 1})
    checkpointer.save_async(2, tree(2), metrics={"accuracy": 1})
    with pytest.raises(fc.errors.SaveFailedError, match=r"\(step 2\) was saved, but what follows"):
        checkpointer.wait()
    assert steps_of(checkpointer) == [1, 2]


# --- failures ----------------------------------------------------------------------------------


def test_a_failure_in_the_background_is_raised_once_at_the_next_call(tmp_path: Path):
    def calls(checkpointer: Checkpointer) -> list[Any]:
        return [
            lambda: checkpointer.should_save(9),
            lambda: checkpointer.save(9, tree(9)),
            checkpointer.load,
            checkpointer.wait,
            checkpointer.reload,
            checkpointer.close,
        ]

    for i in range(6):
        checkpointer = Checkpointer(tmp_path, context=with_handler(RefusingHandler))
        response = checkpointer.save_async(1, {})
        response.ended.wait()
        with pytest.raises(fc.errors.SaveFailedError) as caught:
            calls(checkpointer)[i]()
        assert "(step 1) was not saved: OSError: " in str(caught.value)
        assert (caught.value.step, caught.value.path) == (1, f"{tmp_path}/1")
        assert isinstance(caught.value.__cause__, OSError)
        checkpointer.close()
        checkpointer.close()
    assert entries(tmp_path) == []


def test_a_failure_that_result_told_is_not_told_again(tmp_path: Path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, context=with_handler(RefusingHandler))
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save(1, {})
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save_async(1, {}).result()
    monkeypatch.setattr(RefusingHandler, "has_space", True)
    assert checkpointer.save(1, tree(1)), "and the step can be saved again"
    checkpointer.close()


def test_a_step_whose_overwrite_failed_is_still_there_for_the_policies(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree(1))
    with Checkpointer(tmp_path, context=with_handler(RefusingHandler)) as checkpointer:
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(1, {}, overwrite=True)
        assert not checkpointer.should_save(1)
        assert steps_of(checkpointer) == [1]


def test_a_disk_that_refuses_leaves_nothing_of_the_step(run_child: Any, tmp_path: Path):
    program = """
        import resource, signal, sys
        import numpy as np
        import flax_ckpt as fc
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with fc.training.Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"w": np.zeros(10)})
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            checkpointer.save_async(2, {"w": np.zeros(100_000)})
            try:
                checkpointer.wait()
            except fc.errors.SaveFailedError as error:
                print(type(error.__cause__).__name__, error.step)
            print([c.step for c in checkpointer.checkpoints])
    """
    done = run_child(program, tmp_path / "run")
    assert done.stdout.splitlines() == ["OSError 2", "[1]"], done.stderr
    assert entries(tmp_path / "run") == ["1"]


def test_an_exception_in_the_block_is_the_one_that_is_raised(tmp_path: Path):
    def save_and_fail() -> None:
        with Checkpointer(tmp_path, context=with_handler(RefusingHandler)) as checkpointer:
            checkpointer.save_async(1, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        save_and_fail()
    assert "(step 1) was not saved" in caught.value.__notes__[0]


def test_something_in_the_way_of_a_step_is_left_alone(tmp_path: Path):
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "mine.txt").write_text("x")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(fc.errors.CheckpointExistsError, match="no checkpoint|already exists"):
            checkpointer.save(2, tree(2), overwrite=True)
        assert steps_of(checkpointer) == []
    assert (tmp_path / "2" / "mine.txt").read_text() == "x"


# --- deleting, cancelling, cleaning --------------------------------------------------------------


def test_delete(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save_async(step, tree(step), force=True)
        assert checkpointer.delete(2) is True
        assert steps_of(checkpointer) == [1, 3]
        response = checkpointer.delete_async(checkpointer.latest)
        assert steps_of(checkpointer) == [1], "it leaves the listing at once"
        assert response.result() is True
        assert checkpointer.delete(3, missing_ok=True) is False
        assert checkpointer.should_save(2), "the policies know"
    assert entries(tmp_path) == ["1"]


def test_delete_one_checkpointable(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(1, {"params": tree(1), "opt_state": {"m": 2}})
        assert checkpointer.delete(1, checkpointable_name="opt_state") is True
        assert sorted(checkpointer.load_checkpointables(1)) == ["params"]
        assert steps_of(checkpointer) == [1]
        with pytest.raises(fc.errors.CheckpointNotFoundError, match="no checkpointable 'opt_state"):
            checkpointer.delete(1, checkpointable_name="opt_state")
        for step in (1, 2):
            arguments = {"checkpointable_name": "opt_state", "missing_ok": True}
            assert checkpointer.delete_async(step, **arguments).result() is False
        with pytest.raises(ValueError, match="'params' is the only checkpointable"):
            checkpointer.delete(1, checkpointable_name="params")
    assert fc.load(tmp_path / "1", checkpointable_name="params")["w"].tolist() == [1, 1, 1]


def test_cancel_drops_what_is_not_committed(tmp_path: Path, held: fc.Context):
    with Checkpointer(tmp_path, context=held) as checkpointer:
        response = checkpointer.save_async(1, {})
        threading.Timer(0.1, Held.release.set).start()
        checkpointer.cancel()
        with pytest.raises(fc.errors.SaveCancelledError, match=f"{tmp_path}/1 was cancelled"):
            response.result()
        assert entries(tmp_path) == []
        assert checkpointer.save(1, {}), "and can be saved again"
        checkpointer.cancel()
        assert steps_of(checkpointer) == [1], "what was committed stays"
        checkpointer.cancel(1)
        assert steps_of(checkpointer) == []
        checkpointer.cancel(1)


def test_cancelling_an_overwrite_leaves_what_was_there(tmp_path: Path, held: fc.Context):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree(1))
    with Checkpointer(tmp_path, context=held) as checkpointer:
        checkpointer.save_async(1, {}, overwrite=True)
        threading.Timer(0.1, Held.release.set).start()
        checkpointer.cancel()
    assert fc.load(tmp_path / "1")["w"].tolist() == [1, 1, 1]


def test_left_overs_are_removed_if_asked_and_nothing_else(tmp_path: Path):
    suffix = ".orbax-checkpoint-tmp"
    ours = [f"step_5{suffix}", f"step_3.deleted{suffix}", f"step_4{suffix}-1700000000"]
    others = [f"notes{suffix}", f"7{suffix}", "plots", f"step_6{suffix}"]
    for name in [*ours, *others]:
        (tmp_path / name / "state").mkdir(parents=True)
    shutil.rmtree(tmp_path / f"step_6{suffix}")
    Staging(str(tmp_path / "step_6")).create(["state"])  # by this process, which runs
    names = fc.path.step.standard_name_format(step_prefix="step")
    Checkpointer(tmp_path, step_name_format=names)
    assert sorted(entries(tmp_path)) == sorted([*ours, *others])
    Checkpointer(tmp_path, step_name_format=names, cleanup_tmp_directories=True)
    assert sorted(entries(tmp_path)) == sorted(others)


# --- names, root, listing, repr -------------------------------------------------------------------


def test_a_run_goes_on_under_other_names(tmp_path: Path):
    steps = fc.path.step
    plain, padded = (
        steps.standard_name_format(),
        steps.standard_name_format(step_prefix="step", step_format_fixed_length=4),
    )
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tree(step))
    both = steps.composite_name_format(padded, [padded, plain])
    latest = preserve.LatestN(2)
    with Checkpointer(tmp_path, step_name_format=both, preservation_policy=latest) as checkpointer:
        assert steps_of(checkpointer) == [1, 2]
        assert checkpointer.load(2)["w"].tolist() == [2, 2, 2]
        checkpointer.save(2, tree(20), overwrite=True)
        assert checkpointer.load(2)["w"].tolist() == [20, 20, 20]
        assert sorted(entries(tmp_path)) == ["1", "step_0002"]
        checkpointer.save(3, tree(3))
    assert sorted(entries(tmp_path)) == ["step_0002", "step_0003"]


def test_a_checkpoint_is_no_root(tmp_path: Path):
    fc.save(tmp_path / "3", tree(3))
    for inside in ("3", "3/state"):
        with pytest.raises(fc.errors.InvalidLayoutError, match="not the root of a run"):
            Checkpointer(tmp_path / inside, custom_metadata={"run": 1})
    assert not (tmp_path / "3" / "metadata").exists()


def test_metadata_of_the_run_are_written_once(tmp_path: Path):
    assert Checkpointer(tmp_path).root_metadata().custom_metadata == {}
    for run in (1, 2):
        found = Checkpointer(tmp_path, custom_metadata={"run": run}).root_metadata()
        assert (found.directory, found.custom_metadata) == (tmp_path, {"run": 1})
    assert os.listdir(tmp_path / "metadata") == ["_ROOT_METADATA"]
    assert json.loads((tmp_path / "metadata" / "_ROOT_METADATA").read_text()) == {
        "internal_metadata": {},
        "custom_metadata": {"run": 1},
    }
    os.rename(tmp_path / "metadata" / "_ROOT_METADATA", tmp_path / "metadata" / "metadata")
    assert Checkpointer(tmp_path).root_metadata().custom_metadata == {"run": 1}
    for wrong in ([1], {"a": object()}):
        with pytest.raises(fc.errors.FormatError, match="custom_metadata"):
            Checkpointer(tmp_path / "other", custom_metadata=wrong)


def test_listing_reads_no_file(tmp_path: Path):
    for step in range(1000):
        (tmp_path / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / str(step) / "_CHECKPOINT_METADATA").write_text("garbage")
    checkpointer = Checkpointer(tmp_path)
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(tmp_path) in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    found = checkpointer.checkpoints
    assert [c.step for c in found] == list(range(1000))
    assert opened == []
    assert found[7].metrics is None
    assert time.time() - found[7].time.timestamp() < 600, "the directory's time"
    assert opened != []
    watching = False


def test_an_explicit_context_is_used_for_everything(tmp_path: Path, held: fc.Context):
    Held.release.set()
    checkpointer = Checkpointer(tmp_path, context=held)
    with fc.Context():
        checkpointer.save(1, {"no": "tree"})
    assert (tmp_path / "1" / "state" / "done").read_text() == "yes"


def test_the_repr_says_where_and_how_far(tmp_path: Path, held: fc.Context):
    checkpointer = Checkpointer(tmp_path, context=held)
    assert repr(checkpointer) == f"Checkpointer({str(tmp_path)!r}, latest=None, idle)"
    checkpointer.save_async(3, {})
    assert repr(checkpointer) == f"Checkpointer({str(tmp_path)!r}, latest=None, saving)"
    Held.release.set()
    checkpointer.close()
    assert repr(checkpointer) == f"Checkpointer({str(tmp_path)!r}, latest=3, idle)"


def test_one_line_per_save(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "flax_ckpt"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"w": np.zeros(4)})
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("saved step 3 · 32 B in ")


# --- the surface of Orbax -------------------------------------------------------------------------

DIFFERS = {
    "__init__": "no logger=: this library logs with `logging`, one line per save",
    "load_async": "Orbax has not built it; ours has load's checkpointable_name too",
    "save_pytree": "deprecated",
    "save_pytree_async": "deprecated",
    "load_pytree": "deprecated",
    "load_pytree_async": "deprecated",
    "pytree_metadata": "deprecated",
    "__contextmanager__": "ours has __enter__ and __exit__",
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def test_methods_and_parameters_are_those_of_orbax():
    theirs = ocp.training.Checkpointer
    public = [n for n in vars(theirs) if not n.startswith("_") or n in DIFFERS or n == "__init__"]
    for name in public:
        there = inspect.getattr_static(theirs, name)
        if name in DIFFERS:
            continue
        here = inspect.getattr_static(Checkpointer, name)
        if isinstance(there, property):
            assert isinstance(here, property), name
        else:
            assert parameters(here) == parameters(there), name
    theirs_init = [p for p in parameters(theirs.__init__) if p[0] != "logger"]
    assert parameters(Checkpointer.__init__) == theirs_init
    for name in ("CheckpointMetadata", "RootMetadata"):
        here, there = (getattr(module, name) for module in (fc.training, ocp.training))
        assert parameters(here) == parameters(there), name


def test_a_step_that_goes_while_it_is_listed_does_not_hide_the_next(tmp_path: Path):
    for step in (1, 2):
        with Checkpointer(tmp_path / str(step)) as checkpointer:
            checkpointer.save(step, tree(step))
    (tmp_path / "run").mkdir()
    (tmp_path / "1" / "1").rename(tmp_path / "run" / "1")
    usual = fc.path.step.standard_name_format()

    class Listing:
        """Between its look at the directory and that at the steps another process goes on."""

        def build_name(self, step: int) -> str:
            return usual.build_name(step)

        def find_step(self, base_path: Any, step: int) -> Any:
            return usual.find_step(base_path, step)

        def find_all(self, base_path: Any) -> Any:
            listed = os.listdir(base_path)
            if listed == ["1"]:
                (tmp_path / "2" / "2").rename(tmp_path / "run" / "2")
                fc.delete(tmp_path / "run" / "1")
            return [each for each in usual.find_all(base_path) if str(each.step) in listed]

    run = Checkpointer(tmp_path / "run", step_name_format=Listing())
    assert run.latest is not None
    assert (run.latest.step, steps_of(run)) == (2, [2])
