"""What the training loop once got wrong, found by use."""

import datetime
import itertools
import logging
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import Preempted
from flax_ckpt.format.config_pb import RunConfig
from flax_ckpt.training import provenance, steps
from flax_ckpt.training.saver import Saver


def tree(step: int) -> dict[str, Any]:
    return {"params": {"w": jnp.full(4, float(step))}, "step": step}


def value(root: Path, step: int) -> float:
    return float(fc.restore_train_state(root, tree(0), step=step)["params"]["w"][0])


def test_a_callback_goes_back_to_an_earlier_step(tmp_path: Path) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=10, keep_last=None) as ckpt:
        ckpt.restore_or_init(tree(0))
        for step in range(1, 46):
            ckpt.on_step_end(step, tree(step))
        assert ckpt.restore_or_init(tree(0), step=20)[1] == 20
        for step in range(21, 36):
            ckpt.on_step_end(step, tree(-step))
    assert steps.committed(str(tmp_path)) == [10, 20, 30, 35]
    assert value(tmp_path, 30) == -30
    moved = sorted(path.name.partition("-")[0] for path in (tmp_path / "superseded").iterdir())
    assert moved == ["30", "40"]


def test_leaving_after_going_back_saves_nothing_of_what_was_given_up(tmp_path: Path) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=10) as ckpt:
        for step in range(1, 16):
            ckpt.on_step_end(step, tree(step))
        ckpt.restore_or_init(tree(0), step=10)
    assert steps.committed(str(tmp_path)) == [10]


FORKS = """
    import multiprocessing, sys, threading, warnings
    import jax.numpy as jnp
    import flax_ckpt as fc
    warnings.simplefilter("ignore")  # JAX and Python warn of forks
    fork = multiprocessing.get_context("fork")
    with fc.CheckpointCallback(sys.argv[1], at_end=False) as ckpt:
        ckpt.on_step_end(1, {"params": jnp.ones(3)})
        for _ in range(20):  # told at once, in the middle of the fork, and a little later
            for told in (lambda child: None, lambda child: child.join(0.02)):
                child = fork.Process(target=threading.Event().wait)
                child.start()
                told(child)
                child.terminate()
                child.join(60)
                print(child.exitcode)
                child.kill()
        assert not ckpt.should_stop
"""


def test_forked_processes_end_when_they_are_told(tmp_path: Path, run_child: Any) -> None:
    done = run_child(FORKS, tmp_path / "run")
    assert done.stdout.split() == ["-15"] * 40


def test_callbacks_closed_in_any_order_leave_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    a, b = (fc.CheckpointCallback(tmp_path / name) for name in "ab")
    a.restore_or_init(tree(0))
    b.restore_or_init(tree(0))
    a.close()
    b.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_callback_that_is_gone_leaves_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ckpt = fc.CheckpointCallback(tmp_path)
    ckpt.on_step_end(1, tree(1))
    assert signal.getsignal(signal.SIGTERM) is not before
    del ckpt
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_after_the_last_step_ends_the_process_all_the_same(tmp_path: Path) -> None:
    ckpt = fc.CheckpointCallback(tmp_path)
    ckpt.on_step_end(1, tree(1))
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        ckpt.close()
    assert (left.value.code, left.value.step) == (143, 1)
    assert steps.committed(str(tmp_path)) == [1]


def test_a_step_that_could_not_be_saved_is_not_called_saved(tmp_path: Path, caplog: Any) -> None:
    ckpt = fc.CheckpointCallback(tmp_path, on_error="warn", at_end=False)
    ckpt.on_step_end(1, tree(1))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "mine").touch()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(fc.errors.CheckpointExistsError):
        ckpt.on_step_end(2, tree(2))
    with pytest.raises(Preempted):
        ckpt.close()
    assert "told to end: step 2 is NOT saved" in caplog.text


@pytest.mark.parametrize("ending", [SystemExit, GeneratorExit])
def test_whatever_is_no_error_saves_the_last_state(tmp_path: Path, ending: Any) -> None:
    with pytest.raises(ending):
        leave(fc.CheckpointCallback(tmp_path), tree(7), ending)
    assert steps.committed(str(tmp_path)) == [7]


def leave(ckpt: fc.CheckpointCallback[Any], state: Any, ending: type[BaseException]) -> None:
    with ckpt:
        ckpt.on_step_end(7, state)
        raise ending


def test_a_dict_that_is_filled_on_is_saved_as_it_was_seen(tmp_path: Path) -> None:
    state = tree(7)

    def fill(ckpt: fc.CheckpointCallback[Any]) -> None:
        with ckpt:
            ckpt.on_step_end(7, state)
            state["params"] = {"w": jnp.full(4, 8.0)}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(fc.CheckpointCallback(tmp_path))
    assert value(tmp_path, 7) == 7


def test_numpy_arrays_may_have_changed_since(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(fc.CheckpointCallback(tmp_path), {"params": np.ones(3)}, KeyboardInterrupt)
    assert "interrupted: step 7 is not saved" in caplog.text


def is_interrupted(root: Path, at: int) -> bool:
    """Whether Ctrl-C came, at that line of `Saver.save` and of its own that it calls."""
    save, lines, before = Saver.save.__code__, itertools.count(1), sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if save not in (frame.f_code, frame.f_back.f_code):
            return None
        if frame.f_code.co_filename != save.co_filename:
            return None
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    try:
        with fc.CheckpointCallback(root, every_n_steps=1) as ckpt:
            sys.settrace(trace)
            try:
                ckpt.on_step_end(1, tree(1))
            finally:
                sys.settrace(before)
    except KeyboardInterrupt:
        return True
    return False


def test_wherever_a_save_is_interrupted_the_step_is_saved_once(tmp_path: Path) -> None:
    at = 1
    while is_interrupted(tmp_path / str(at), at):
        assert value(tmp_path / str(at), 1) == 1
        at += 1
    assert at > 50


class Refuses:
    def write_scalars(self, step: int, scalars: Any) -> None:
        raise OSError("the disk of TensorBoard is full")


def test_a_writer_that_fails_costs_no_checkpoint(tmp_path: Path, caplog: Any) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=5, writer=Refuses()) as ckpt:
        for step in range(1, 7):
            ckpt.on_step_end(step, tree(step))
    assert steps.committed(str(tmp_path)) == [5, 6]
    assert "the writer refused the figures of step 5" in caplog.text


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path, caplog: Any) -> None:
    metrics = {"loss": 0.5, "lr": None, "split": "train", "one": jnp.ones((1, 1))}
    with fc.CheckpointCallback(tmp_path, keep_best=("one", "max")) as ckpt:
        ckpt.on_step_end(1, tree(1), metrics=metrics)
    assert fc.restore(tmp_path, step="best").metrics == {"loss": 0.5, "one": 1.0}
    assert "not saved: metric 'split' is 'train'" in caplog.text
    assert "cannot be the best" not in caplog.text


def test_a_step_may_be_the_states_own_and_be_donated(tmp_path: Path) -> None:
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": jnp.zeros(3), "step": jnp.int32(0)}
    with fc.CheckpointCallback(tmp_path, every_n_steps=2) as ckpt:
        for _ in range(4):
            state = update(state)
            ckpt.on_step_end(state["step"], state)
    assert steps.committed(str(tmp_path)) == [2, 4]


def test_a_clock_that_was_ahead_does_not_stop_the_saves() -> None:
    from flax_ckpt.training import policies

    _, timer = policies.saving(None, 60, None)
    now = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
    timer.start(int(now.timestamp() * 1e9))
    ahead, later = now.replace(year=2027), now.replace(hour=1)
    asked, last = SimpleNamespace(time=later), SimpleNamespace(time=ahead)
    assert timer.should_save(asked, [last], context=None)  # type: ignore[arg-type]


def test_a_message_with_a_field_of_that_name_has_no_provenance() -> None:
    from flax_ckpt.adapters import config as configs

    assert configs.provenance_of(RunConfig()) == {}
    assert configs.provenance_of(SimpleNamespace(provenance="text")) == {}  # type: ignore[arg-type]


def test_arguments_of_any_bytes_and_packages_that_are_not_installed(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--name=\udcff"])
    monkeypatch.setattr(provenance, "_PACKAGES", ("jax", "no-such-package"))
    found = provenance.collect()
    assert found["argv"] == ["train.py", "--name=\\udcff"]
    assert found["versions"]["no_such_package"] == "unknown"
    monkeypatch.setattr(sys, "argv", [])
    assert provenance.collect()["argv"] == []


def test_git_that_is_not_there_is_no_obstacle(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.collect()["git"] is None


def test_the_process_that_replaced_itself_has_its_own_lock(tmp_path: Path) -> None:
    from flax_ckpt.format.names import LOCK
    from flax_ckpt.storage import commit

    (tmp_path / LOCK).write_text(f"{commit.identity(os.getpid())}\n2026-01-01\n")
    with fc.CheckpointCallback(tmp_path) as ckpt:
        ckpt.on_step_end(1, tree(1))
    assert os.listdir(tmp_path) == ["1"]


def test_nothing_is_logged_of_a_plain_run_but_one_line_a_save(tmp_path: Path, caplog: Any) -> None:
    options: Any = {"every_n_steps": 2, "at_end": False}
    with (
        caplog.at_level(logging.INFO, "flax_ckpt"),
        fc.CheckpointCallback(tmp_path, **options) as ckpt,
    ):
        for step in range(1, 6):
            ckpt.on_step_end(step, tree(step))
    assert len(caplog.records) == 2
