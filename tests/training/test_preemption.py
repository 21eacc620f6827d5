"""A signal ends a run with exactly one more step, and nothing lost."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import Preempted


def tree(step: int) -> dict[str, Any]:
    return {"params": {"w": jnp.full(3, float(step))}, "step": step}


def tell(_: object = None, number: int = signal.SIGTERM) -> None:
    """A signal to this process; its handler has run when this returns."""
    signal.raise_signal(number)


def ctrl_c(_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def train(root: Path, *what: Any, **options: Any) -> None:
    """A run: a number is a step, a function is called with the callback, an error is raised."""
    with fc.CheckpointCallback(root, **options) as ckpt:
        for each in what:
            if isinstance(each, int):
                ckpt.on_step_end(each, tree(each))
            elif isinstance(each, type):
                raise each
            else:
                each(ckpt)


RUNS = """
    import json, logging, sys
    import numpy as np
    import flax_ckpt as fc
    from flax_ckpt.errors import Preempted

    lines = []
    class Lines(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
    logger = logging.getLogger("flax_ckpt")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)

    for run in range(int(sys.argv[2])):
        root = f"{sys.argv[1]}/{run}"
        lines.clear()
        done = 0
        try:
            with fc.CheckpointCallback(root, every_n_steps=3, keep_last=None) as ckpt:
                state, step = ckpt.restore_or_init({"params": np.zeros(1000), "step": 0})
                print("go", flush=True)
                while True:
                    state = {"params": state["params"] + 1, "step": step + 1}
                    step += 1
                    done = step
                    ckpt.on_step_end(step, state)
        except Preempted as told:
            left = told
        saved = [int(line.split()[2]) for line in lines if line.startswith("saved step")]
        print(json.dumps([left.code, left.step, done, saved]), flush=True)
"""


def test_a_signal_at_50_moments_loses_nothing_and_saves_nothing_twice(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    moments, count = random.Random(seed), 50
    script = textwrap.dedent(RUNS)
    command = [sys.executable, "-c", script, str(tmp_path), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for run in range(count):
            assert child.stdout.readline() == "go\n"
            threading.Event().wait(moments.uniform(0, 0.03))  # the moment is the input
            child.send_signal(signal.SIGTERM)
            code, step, done, saved = json.loads(child.stdout.readline())
            what = f"run {run}, seed {seed}"
            assert (code, step) == (143, done), what
            assert saved == sorted(set(saved)), what
            assert saved == sorted({*range(3, done, 3), done}), what
            found = fc.restore(tmp_path / str(run))
            assert found.step == done, what
            np.testing.assert_array_equal(found.state["params"], np.full(1000, float(done)))
    assert child.returncode == 0


def test_the_next_step_is_saved_and_the_process_ends(tmp_path: Path, caplog: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        train(tmp_path, 1, tell, 2, every_n_steps=100)
    assert isinstance(left.value, SystemExit)
    assert (left.value.code, left.value.step) == (143, 2)
    assert sorted(os.listdir(tmp_path)) == ["2"]
    assert f"told to end: step 2 is saved, {tmp_path}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_that_is_due_anyway_is_saved_once(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, 1, tell, 2, every_n_steps=1)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_stop_leaves_the_loop_to_its_owner(tmp_path: Path) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=100, on_preemption="stop") as ckpt:
        steps = 0
        while not ckpt.should_stop:
            steps += 1
            if steps == 3:
                tell()
            assert ckpt.on_step_end(steps, tree(steps)) == (steps == 3)
        assert ckpt.latest_step == 3, "it is durable when `should_stop` is true"
    assert sorted(os.listdir(tmp_path)) == ["3"]


def test_a_handler_that_was_there_is_called_and_put_back(tmp_path: Path) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted):
            train(tmp_path, 1, tell, lambda _: calls.append(0), 2)
        assert calls == [signal.SIGTERM, 0]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_came_later_stays(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with fc.CheckpointCallback(tmp_path) as ckpt:
            ckpt.on_step_end(1, tree(1))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_counts_if_asked_and_the_second_one_interrupts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 1, ctrl_c, ctrl_c, signals=[signal.SIGINT], at_end=False)
    with pytest.raises(Preempted) as left:
        train(tmp_path, 1, ctrl_c, 2, signals=[signal.SIGINT])
    assert left.value.code == 130


def test_poll_saves_the_state_given_in_the_middle_of_an_evaluation(tmp_path: Path) -> None:
    def poll(ckpt: fc.CheckpointCallback[Any]) -> None:
        ckpt.poll(2, tree(2))

    with pytest.raises(Preempted) as left:
        train(tmp_path, 1, poll, tell, poll)
    assert left.value.step == 2
    assert sorted(os.listdir(tmp_path)) == ["2"]


def test_poll_without_a_state_takes_the_last_one_seen_if_that_is_whole(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.zeros(3)}}
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)

    def train_on(ckpt: fc.CheckpointCallback[Any]) -> None:
        ckpt.on_step_end(1, state)
        tell()
        newer = donate(state)
        ckpt.poll()
        assert ckpt.latest_step is None, "step 1 is donated: there is nothing to save"
        ckpt.on_step_end(2, newer)

    with pytest.raises(Preempted) as left:
        train(tmp_path / "a", train_on)
    assert left.value.step == 2
    with pytest.raises(Preempted) as left:
        train(tmp_path / "b", 5, tell, lambda ckpt: ckpt.poll())
    assert left.value.step == 5
    assert fc.restore_train_state(tmp_path / "b", tree(0))["step"] == 5


def test_another_thread_than_the_main_one_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with fc.CheckpointCallback(tmp_path) as ckpt:
                ckpt.on_step_end(1, tree(1))
                assert signal.getsignal(signal.SIGTERM) is before
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["1"]


def test_before_the_first_step_a_signal_does_what_it_always_did(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ckpt = fc.CheckpointCallback(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    ckpt.close()


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ValueError])
def test_ctrl_c_saves_the_last_state_and_an_error_does_not(tmp_path: Path, ending: Any) -> None:
    with pytest.raises(ending):
        train(tmp_path, 4, ending)
    assert os.listdir(tmp_path) == (["4"] if ending is KeyboardInterrupt else [])


def test_ctrl_c_says_why_a_donated_state_is_not_saved(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, 1)
    state = {"params": jnp.zeros(3)}

    def train_on(ckpt: fc.CheckpointCallback[Any]) -> None:
        ckpt.on_step_end(2, state)
        state["params"].delete()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, train_on)
    assert "step 2 is not saved, since its arrays were donated" in caplog.text
    assert "The newest saved step is 1" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["1"]
