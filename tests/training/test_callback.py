"""`CheckpointCallback` in a loop: when it saves, what it keeps, what it says."""

import datetime
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import flax_ckpt as fc
from flax_ckpt.training import policies, steps
from tests.training.states import assert_same, create, train


def tree(step: int) -> Any:
    return {"params": {"w": np.full(3, step)}, "step": step}


def run(ckpt: fc.CheckpointCallback, first: int, last: int) -> list[int]:
    return [step for step in range(first, last) if ckpt.on_step_end(step, tree(step))]


def test_it_saves_every_n_steps_and_keeps_the_last(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=2, keep_last=2) as ckpt:
        assert run(ckpt, 1, 9) == [2, 4, 6, 8]
    assert steps.committed(str(tmp_path)) == [6, 8]
    assert ckpt.latest_step == 8
    assert fc.restore(tmp_path, tree(0)).state["params"]["w"].tolist() == [8, 8, 8]


def test_leaving_the_block_saves_the_last_state_once(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=2) as ckpt:
        run(ckpt, 1, 4)
    assert steps.committed(str(tmp_path)) == [2, 3]
    with fc.CheckpointCallback(tmp_path / "b", every_n_steps=2, at_end=False) as ckpt:
        run(ckpt, 1, 4)
    assert steps.committed(str(tmp_path / "b")) == [2]


def test_without_a_with_block_close_does_the_same(tmp_path: Path):
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=2)
    run(ckpt, 1, 4)
    ckpt.wait()
    assert ckpt.latest_step == 2
    ckpt.close()
    assert ckpt.latest_step == 3
    ckpt.close()


def test_an_exception_finishes_what_is_in_flight_and_saves_nothing_more(tmp_path: Path):
    def train_and_fail() -> None:
        with fc.CheckpointCallback(tmp_path, every_n_steps=2) as ckpt:
            run(ckpt, 1, 4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert steps.committed(str(tmp_path)) == [2]


def test_should_save_is_decided_once_per_step(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=3) as ckpt:
        wanted = [step for step in range(1, 7) if ckpt.should_save(step)]
        assert wanted == [3, 6]
        assert ckpt.should_save(3) == ckpt.on_step_end(3, tree(3)) is True
        assert ckpt.on_step_end(3, tree(3)) is False


def test_force_does_not_save_a_step_again(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        assert [ckpt.on_step_end(step, tree(step), force=True) for step in (5, 3, 3)] == [
            True,
            True,
            False,
        ]
        assert not ckpt.on_step_end(5, tree(5), force=True)
    assert steps.committed(str(tmp_path)) == [3, 5]


def test_force_saves_in_any_case(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=100) as ckpt:
        assert ckpt(7, tree(7), force=True)
        assert not ckpt(7, tree(7), force=True), "it is saved already"
    assert steps.committed(str(tmp_path)) == [7]


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_period_that_is_not_positive_is_refused(tmp_path: Path, wrong: int):
    with pytest.raises(ValueError, match=f"every_n_steps must be at least 1, got {wrong}"):
        fc.CheckpointCallback(tmp_path, every_n_steps=wrong)
    with pytest.raises(ValueError, match=f"every_secs must be positive, got {wrong}"):
        fc.CheckpointCallback(tmp_path, every_secs=wrong)


def test_seconds_count_from_the_last_save_or_the_beginning(tmp_path: Path):
    hour = datetime.timedelta(hours=1)
    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    _, timer = policies.saving(None, 2 * 3600, None)
    timer.start(int(began.timestamp() * 1e9))

    def due(hours: float, *previous: int) -> bool:
        at = [SimpleNamespace(step=i, time=began + i * hour) for i in (*previous, hours)]
        return timer.should_save(at[-1], at[:-1], context=None)

    assert [due(1.9), due(2)] == [False, True]
    assert [due(1.9, -9), due(2, -9)] == [False, True], "the step resumed from is older"
    assert [due(4.9, 1, 3), due(5, 1, 3)] == [False, True]


def test_what_comes_first_is_enough(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=3, every_secs=1e9, at_end=False) as ckpt:
        assert run(ckpt, 1, 8) == [3, 6]
    with fc.CheckpointCallback(tmp_path / "b", every_n_steps=99, every_secs=1e-9) as ckpt:
        assert run(ckpt, 1, 4) == [1, 2, 3]
    with fc.CheckpointCallback(tmp_path / "c", at_end=False) as ckpt:
        assert run(ckpt, 1, 4) == [], "every 600 s"


def test_steps_that_are_not_saved_do_not_look_at_the_disk(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=10, at_end=False) as ckpt:
        run(ckpt, 1, 12)
        ckpt.wait()
        shutil.rmtree(tmp_path)
        assert run(ckpt, 12, 20) == []
        assert not tmp_path.exists()


def test_resume_gives_the_state_and_its_step(tmp_path: Path):
    abstract = jax.eval_shape(create)
    with fc.CheckpointCallback(tmp_path, every_n_steps=2) as ckpt:
        state, step = ckpt.restore_or_init(abstract, init=create)
        assert step == 0
        state = train(state, 0, 2)
        ckpt.on_step_end(2, state)
    again = fc.CheckpointCallback(tmp_path, every_n_steps=2)
    resumed, step = again.restore_or_init(abstract, init=lambda: pytest.fail("must not run"))
    assert step == 2
    assert_same(resumed, state)
    assert not again.should_save(2), "the step that was restored is not saved again"


def test_a_concrete_state_is_its_own_beginning(tmp_path: Path):
    first = tree(0)
    state, step = fc.CheckpointCallback(tmp_path).restore_or_init(first)
    assert state is first
    assert step == 0


def test_an_abstract_state_needs_init(tmp_path: Path):
    ckpt = fc.CheckpointCallback(tmp_path)
    with pytest.raises(fc.errors.StateError, match="no step to restore, .* abstract: pass init="):
        ckpt.restore_or_init(jax.eval_shape(create))


def test_steps_after_the_one_resumed_from_are_moved_aside_at_the_first_save(tmp_path, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        run(ckpt, 1, 4)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        _, step = ckpt.restore_or_init(tree(0), step=1)
        assert step == 1
        assert steps.committed(str(tmp_path)) == [1, 2, 3], "restoring alone moves nothing"
        with caplog.at_level(logging.WARNING, "flax_ckpt"):
            run(ckpt, 2, 3)
    assert steps.committed(str(tmp_path)) == [1, 2]
    moved = sorted(path.name.partition("-")[0] for path in (tmp_path / "superseded").iterdir())
    assert moved == ["2", "3"]
    assert "goes on from step 1: the later steps [2, 3] were moved to" in caplog.text
    (kept,) = (tmp_path / "superseded").glob("3-*")
    assert fc.load_checkpointables(kept)["params"]["w"].tolist() == [3, 3, 3]


class Refuses:
    """A checkpointable whose writing fails in the background."""


class RefusingHandler:
    has_space = False

    async def save(self, directory, checkpointable):
        async def write():
            path = await directory.await_creation()
            if not self.has_space:
                raise OSError(28, "No space left on device", str(path))
            (path / "done").write_text("yes")

        return write()

    async def load(self, directory, abstract_checkpointable=None):
        raise AssertionError

    async def metadata(self, directory):
        return None

    def is_handleable(self, checkpointable):
        return True

    def is_abstract_handleable(self, abstract_checkpointable):
        return True


class Held(RefusingHandler):
    """Its background part waits until it is released, so that a save is in flight till then."""

    release = threading.Event()

    async def save(self, directory, checkpointable):
        async def write():
            path = await directory.await_creation()
            assert Held.release.wait(60)
            (path / "done").write_text("yes")

        return write()


@pytest.fixture
def failing() -> fc.Context:
    """A context in which saving `params` fails."""
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        RefusingHandler, checkpointable_name="params"
    )
    return context


def test_a_background_failure_is_raised_at_the_next_call(tmp_path: Path, failing: fc.Context):
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=failing)
    assert ckpt.on_step_end(1, tree(1))
    with pytest.raises(fc.errors.SaveFailedError) as caught:
        ckpt.on_step_end(2, tree(2))
    message = str(caught.value)
    assert re.search(r"checkpoint .*/1 \(step 1\) was not saved: OSError: .*No space", message)
    assert (caught.value.step, caught.value.path) == (1, str(tmp_path / "1"))
    assert isinstance(caught.value.__cause__, OSError)
    assert ckpt.latest_step is None
    assert os.listdir(tmp_path) == [".flax_ckpt.lock"]


def test_a_failure_is_raised_by_wait_and_by_leaving_the_block(tmp_path: Path, failing: fc.Context):
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=failing)
    ckpt.on_step_end(1, tree(1))
    with pytest.raises(fc.errors.SaveFailedError):
        ckpt.wait()
    ckpt.wait()
    with pytest.raises(fc.errors.SaveFailedError), ckpt:
        ckpt.on_step_end(2, tree(2))


def test_on_error_warn_goes_on_and_saves_the_next_step(
    tmp_path: Path, failing, caplog, monkeypatch
):
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, on_error="warn", context=failing)
    ckpt.on_step_end(1, tree(1))
    ckpt.wait()
    assert "(step 1) was not saved: OSError" in caplog.text
    monkeypatch.setattr(RefusingHandler, "has_space", True)
    assert ckpt.on_step_end(2, tree(2))
    ckpt.close()
    assert steps.committed(str(tmp_path)) == [2]


def test_a_step_that_cannot_be_saved_is_an_error_of_its_own_call(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, at_end=False) as ckpt:
        with pytest.raises(
            fc.errors.UnsupportedLeafError, match="'params': 1 of 1 leaves(.|\n)*  f: a .*function"
        ):
            ckpt.on_step_end(1, {"params": {"f": lambda: None}})
        donated = jnp.ones(3)
        donated.delete()
        with pytest.raises(fc.errors.UnsupportedLeafError, match="  w: .* donated or deleted"):
            ckpt.on_step_end(2, {"params": {"w": donated}})


def test_another_step_than_the_state_counts_is_warned_of_once(tmp_path: Path, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(2))
        ckpt.on_step_end(2, tree(3))
    assert caplog.text.count("pass the number of completed updates") == 1


def test_one_line_per_save_and_per_restore(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "flax_ckpt"):
        with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
            ckpt.on_step_end(1, tree(1))
        fc.restore(tmp_path, tree(0))
    saved, restored = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        rf"saved step 1 · 32 B in .*s \(.*/s\) · blocked .*s · {tmp_path.name}/1", saved
    ), saved
    assert re.fullmatch(rf"restored step 1 · 32 B in .*s \(.*/s\) · {tmp_path.name}/1", restored)


def test_changes_of_the_config_are_logged_on_resume(tmp_path: Path, caplog):
    config = ConfigDict({"learning_rate": 1e-3, "width": 64})
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, config=config) as ckpt:
        ckpt.on_step_end(1, tree(1))
    config.learning_rate = 3e-4
    with caplog.at_level(logging.INFO, "flax_ckpt"):
        fc.CheckpointCallback(tmp_path, config=config).restore_or_init(tree(0))
    assert "config changed since the checkpoint: learning_rate 0.001 → 0.0003" in caplog.text


def test_a_config_that_cannot_be_saved_is_refused_at_once(tmp_path: Path):
    with pytest.raises(fc.errors.ConfigError, match="model.activation"):
        fc.CheckpointCallback(tmp_path, config={"model": {"activation": jax.nn.relu}})


def test_left_overs_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path):
    for name in ("5.orbax-checkpoint-tmp", "3.deleted.orbax-checkpoint-tmp"):
        (tmp_path / name / "params").mkdir(parents=True)
    (tmp_path / "notes.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "plots").mkdir()
    with fc.CheckpointCallback(tmp_path) as ckpt:
        ckpt.restore_or_init(tree(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.orbax-checkpoint-tmp",
        "plots",
    ]


def test_a_directory_that_is_no_checkpoint_is_not_a_step(tmp_path: Path):
    (tmp_path / "12").mkdir()
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(3, tree(3))
    assert ckpt.latest_step == 3


def test_a_due_save_waits_for_the_one_in_flight(tmp_path: Path):
    release = threading.Event()

    class Slow(RefusingHandler):
        async def save(self, directory, checkpointable):
            async def write():
                path = await directory.await_creation()
                assert release.wait(60)
                (path / "done").write_text("yes")

            return write()

    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Slow, checkpointable_name="params"
    )
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, context=context)
    ckpt.on_step_end(1, tree(1))
    assert ckpt.latest_step is None
    threading.Timer(0.2, release.set).start()
    ckpt.on_step_end(2, tree(2))
    assert ckpt.latest_step == 1, "step 2 begins only when step 1 is durable"
    ckpt.close()
    assert ckpt.latest_step == 2


def test_the_repr_says_where_and_how_far(tmp_path: Path):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
    assert repr(ckpt) == f"CheckpointCallback({str(tmp_path)!r}, latest_step=1, idle)"


def test_a_loop_that_begins_anew_after_a_restore_is_warned_of_once(tmp_path: Path, caplog):
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        run(ckpt, 1, 4)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, at_end=False) as ckpt:
        ckpt.restore_or_init(tree(0))
        assert run(ckpt, 1, 6) == [4, 5]
    (warning,) = [r.getMessage() for r in caplog.records if "is not saved" in r.getMessage()]
    assert warning == (
        "step 1 is not saved, since step 3 is: only later steps are, from 4 on. A loop that resumes"
        " goes on from the step that was restored"
    )
