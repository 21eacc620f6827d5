"""Training, readers and writers at the same time.

- Steps that donate their state while saves of earlier ones run: each saved tree is its own step's.
- Another process that reads while steps are saved and deleted, or a checkpoint is replaced.
- Two processes that save to one run, also when the first is stopped for a while.
- Threads that save side by side.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import RunInUseError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files, lock
from torture.outcome import Outcome
from torture.racers import tree_of, value_of

ROOT = Path(__file__).resolve().parents[1]
FACTOR, SUMMAND = 1_664_525, 1_013_904_223  # of a generator modulo 2³²


def campaign(scale: float, seed: int) -> list[Outcome]:
    def times(whole: int, least: int) -> int:
        return max(least, round(whole * scale))

    return [
        donated_steps(times(10_000, 100), seed),
        read_while_saved_and_deleted(times(500, 20)),
        read_while_replaced(times(500, 20)),
        claimed_at_once(times(200, 5)),
        *(stopped_writer(times(10, 1), **kind) for kind in STOPPED),
        threads(times(1_000, 16)),
        threads_on_one_path(times(500, 10)),
    ]


# Donated steps.


class Sequence:
    """States each of which follows from the one before, and also from its number alone."""

    def __init__(self, devices: int) -> None:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
        self.split = NamedSharding(mesh, PartitionSpec("x"))
        self.all = NamedSharding(mesh, PartitionSpec())
        self._factor, self._summand = [1], [0]

        def follow(state: Any) -> Any:
            arrays = [x * FACTOR + SUMMAND for x in state["params"]]
            key = jax.random.fold_in(state["key"], state["step"])
            return {"params": arrays, "key": key, "step": state["step"] + 1}

        self.follow: Callable[[Any], Any] = jax.jit(follow, donate_argnums=0)

    def first(self) -> Any:
        sizes = {1 << 18: self.split, 1 << 16: self.all, 7: self.all}
        params = [jax.device_put(jnp.arange(n, dtype=jnp.uint32), s) for n, s in sizes.items()]
        return {"params": params, "key": jax.random.key(0), "step": jnp.int32(0)}

    def is_state(self, number: int, state: Any) -> bool:
        """Whether this is the state after so many steps, to the last bit."""
        while len(self._factor) <= number:
            self._factor.append(self._factor[-1] * FACTOR % (1 << 32))
            self._summand.append((self._summand[-1] * FACTOR + SUMMAND) % (1 << 32))
        factor, summand = np.uint32(self._factor[number]), np.uint32(self._summand[number])
        arrays = [np.asarray(x) for x in state["params"]]
        right = [np.arange(len(x), dtype=np.uint32) * factor + summand for x in arrays]
        return (
            int(state["step"]) == number == int(state["counter"][0])
            and bool((state["counter"] == number).all())
            and all(x.dtype == np.uint32 for x in arrays)
            and all(map(np.array_equal, arrays, right))
        )


def donated_steps(count: int, seed: int) -> Outcome:
    """Saves in flight, up to four at a time, while the steps after them take their buffers."""
    outcome = Outcome(f"{count:,} train steps that donate their state, with saves overlapping")
    sequence, chance = Sequence(min(8, len(jax.devices()))), random.Random(seed)
    state, counter = sequence.first(), np.zeros(5000, np.int64)
    in_flight: dict[int, fc.AsyncResponse[None]] = {}
    overlapped = 0
    with tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root:

        def check(number: int) -> None:
            in_flight.pop(number).result()
            saved = fc.load(f"{root}/{number}")
            outcome.check(sequence.is_state(number, saved), f"step {number}, seed {seed}")
            shutil.rmtree(f"{root}/{number}")

        for number in range(1, count + 1):
            state = sequence.follow(state)
            counter += 1  # in place
            if chance.random() < 0.2:
                overlapped += any(not response.done() for response in in_flight.values())
                whole = {**state, "counter": counter}
                in_flight[number] = fc.save_async(f"{root}/{number}", whole)
            if len(in_flight) > 4:
                check(next(iter(in_flight)))
        for number in list(in_flight):
            check(number)
    outcome.notes["saves begun while another ran"] = f"{overlapped:,}"
    return outcome


# Other processes.


@contextmanager
def racer(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, when it is ready."""
    with subprocess.Popen(
        [sys.executable, "-m", "torture.racers", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = heard(process)
            assert said == "ready", said
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], line: object = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def _ended(process: subprocess.Popen[str], outcome: Outcome, last: int) -> None:
    tell(process)
    found = heard(process)
    outcome.runs = found["seen"] + len(found["wrong"])
    outcome.wrong += found["wrong"]
    if not found["seen"] or found["last"] > last:
        outcome.wrong.append(f"it saw {found['seen']} states, the last was {found['last']}")


def read_while_saved_and_deleted(count: int) -> Outcome:
    outcome = Outcome(f"another process restores the latest of {count:,} steps, each deleted soon")
    with (
        tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root,
        racer("restorer", root) as reader,
    ):
        with fc.CheckpointCallback(root, every_n_steps=1, keep_last=1) as ckpt:
            for step in range(1, count + 1):
                ckpt.on_step_end(step, tree_of(step))
        _ended(reader, outcome, count)
    return outcome


def read_while_replaced(count: int) -> Outcome:
    outcome = Outcome(f"another process loads a checkpoint that is replaced {count:,} times")
    with tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root:
        path = f"{root}/ckpt"
        with racer("loader", path) as reader:
            for value in range(count):
                fc.save(path, tree_of(value), overwrite=True)
            _ended(reader, outcome, count)
    return outcome


def claimed_at_once(rounds: int) -> Outcome:
    """In every second round a process that was killed has left its lock."""
    outcome = Outcome("three processes begin to save to one run at once: one gets it")
    with subprocess.Popen(["true"]) as ended:
        stale = f"{commit.identity(os.getpid()).replace(str(os.getpid()), str(ended.pid))}\nthen\n"
    with (
        tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root,
        racer("claimer", root, 1) as first,
        racer("claimer", root, 2) as second,
        racer("claimer", root, 3) as third,
    ):
        everyone = [first, second, third]
        for number in range(rounds):
            run = Path(root, str(number))
            run.mkdir()
            if number % 2:
                (run / names.LOCK).write_text(stale)
            for process in everyone:
                tell(process, number)
            said = [heard(process) for process in everyone]
            winners = [i + 1 for i, text in enumerate(said) if text == "saved"]
            good = said.count("refused") == 2 and [value_of(fc.restore(run).state)] == winners
            outcome.check(good, f"round {number}: {said}")
            for process in everyone:
                tell(process)
    return outcome


STOPPED: tuple[dict[str, Any], ...] = ({"elsewhere": False}, {"elsewhere": True})


@contextmanager
def on_another_machine() -> Iterator[None]:
    """This process does not know which processes run where the other one does."""
    machine, stale = commit.machine, lock.STALE_SECS
    commit.machine, lock.STALE_SECS = (lambda: "elsewhere:1"), 1.0  # type: ignore[misc]
    try:
        yield
    finally:
        commit.machine, lock.STALE_SECS = machine, stale  # type: ignore[misc]


@contextmanager
def within_save(action: Callable[[], Any]) -> Iterator[list[Any]]:
    """Does something in the next save, when all is written and before it is synced."""
    sync, results = files.sync_tree, list[Any]()

    def first(root: str) -> None:
        files.sync_tree = sync
        results.append(action())
        sync(root)

    files.sync_tree = first
    try:
        yield results
    finally:
        files.sync_tree = sync


def stopped_writer(rounds: int, elsewhere: bool) -> Outcome:
    """The first is stopped within a save. On its own machine it still has the run; a process of
    another one takes it after a while, and then the first does not save any more, nor does it harm
    what the second is saving."""
    where = "another machine takes over" if elsewhere else "the same machine is refused"
    outcome = Outcome(f"a writer is stopped within a save (SIGSTOP); one of {where}")
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root:
            fifo = f"{root}/fifo"
            os.mkfifo(fifo)
            run, step = f"{root}/run", 2 + number // 2 % 2
            with racer("writer", run, fifo) as first:
                assert heard(first) == "within"
                first.send_signal(signal.SIGSTOP)
                if elsewhere:
                    with on_another_machine(), fc.training.Checkpointer(run) as second:
                        wake = partial(_continue, first, fifo)
                        if number % 2:
                            second.save(step, tree_of(7))
                            said = wake()
                        else:
                            with within_save(wake) as results:
                                second.save(step, tree_of(7))
                            (said,) = results
                        second.save(5, tree_of(8))
                    wanted = [1, step, 5]
                    good = not any(text.startswith("saved") for text in said[1:])
                else:
                    try:
                        fc.training.Checkpointer(run).save(2, tree_of(7))
                        good = False
                    except RunInUseError:
                        good = True
                    said = _continue(first, fifo)
                    wanted = [1, 2, 3]
                    good = good and said == ["saved 1", "saved 2", "saved 3"]
            steps = [step.step for step in fc.training.Checkpointer(run).checkpoints]
            values = {step: value_of(fc.load(f"{run}/{step}")) for step in steps}
            expected = {step: -step for step in wanted}
            if elsewhere:
                expected |= {wanted[1]: 7, 5: 8}
            outcome.check(good and values == expected, f"round {number}: {said}, {values}")
    return outcome


def _continue(process: subprocess.Popen[str], fifo: str) -> Any:
    process.send_signal(signal.SIGCONT)
    with open(fifo, "w"):
        pass
    return heard(process)


# Threads.


def threads(count: int) -> Outcome:
    """Eight at a time, each with a path of its own; half of the saves in the background."""
    outcome = Outcome(f"{count:,} saves and loads by eight threads at once")
    with tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root:

        def save(value: int) -> int | None:
            path = f"{root}/{value}"
            if value % 2:
                fc.save(path, tree_of(value))
            else:
                fc.save_async(path, tree_of(value)).result()
            found = value_of(fc.load(path))
            shutil.rmtree(path)
            return found

        with ThreadPoolExecutor(8) as pool:
            for value, found in enumerate(pool.map(save, range(count))):
                outcome.check(found == value, f"{value} came back as {found}")
    return outcome


def threads_on_one_path(count: int) -> Outcome:
    """Four threads replace one checkpoint; what is there afterwards is the last of one of them."""
    outcome = Outcome(f"four threads replace one checkpoint, {count:,} times")
    with tempfile.TemporaryDirectory(prefix="flax_ckpt_races_") as root:
        for number in range(0, count, 4):
            path, begin = f"{root}/{number}", threading.Barrier(4)

            def save(value: int, path: str = path, begin: threading.Barrier = begin) -> None:
                begin.wait()
                fc.save(path, tree_of(value), overwrite=True)

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(save, range(number, number + 4)))
            found = value_of(fc.load(path))
            good = found in range(number, number + 4) and os.listdir(root) == [str(number)]
            outcome.check(good, f"{found} of {number}; {os.listdir(root)}")
            shutil.rmtree(path)
    return outcome
