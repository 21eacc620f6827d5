"""The position of the data iterator: saved with each step, restored with it."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    FormatError,
    NotHandleableError,
    StateError,
    TreeMismatchError,
)
from tests.storage.test_processes import run_two
from tests.training import feeding
from tests.training.states import assert_same

ROOT = Path(__file__).parents[2]
LIKE = {"params": {"w": np.zeros(3)}}


def tree(step: int) -> Any:
    return {"params": {"w": np.full(3, float(step))}}


def save(root: Path, iterator: Any, steps: int = 3, **options: Any) -> None:
    """Saves steps 1, 2, …, each after one batch."""
    with fc.CheckpointCallback(
        root, every_n_steps=1, data_iterator=iterator, **options
    ) as callback:
        for step in range(1, steps + 1):
            next(iterator)
            callback.on_step_end(step, tree(step))


def state_of(iterator: Any) -> Any:
    """Compared with `==`."""
    inner = getattr(iterator, "inner", iterator)
    return repr(inner.get_state())


class Counter:
    """Counts; takes only states of its own kind."""

    def __init__(self, n: Any = 0) -> None:
        self.n = n

    def __next__(self) -> int:
        self.n += 1
        return self.n

    def get_state(self) -> Any:
        return self.n

    def set_state(self, state: Any) -> None:
        if not isinstance(state, int):
            raise ValueError("I count in ints")
        self.n = state


# A run that is killed.


def child(kind: str, root: Path, log: Path, kill_after: int) -> int:
    """Trains in a process of its own; returns how it ended."""
    command = ["-m", "tests.training.feeding", kind, str(root), str(log), str(kill_after)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def lines(log: Path) -> list[Any]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("kind", feeding.KINDS)
def test_a_killed_run_sees_every_record_once_and_ends_with_the_same_bits(
    tmp_path: Path, kind: str
) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    assert child(kind, root, log, kill_after=11) == -signal.SIGKILL
    resumed_after = fc.training.Checkpointer(root).latest.step
    assert resumed_after in (6, 9), "one save was in flight at most"
    assert child(kind, root, log, kill_after=0) == 0

    # What a committed step was made of is what its steps saw last: the killed ones are not in it.
    found = {step: (batch, loss) for step, batch, loss in lines(log)}
    assert [step for step, *_ in lines(log)][11] == resumed_after + 1
    assert sorted(itertools.chain(*(batch for batch, _ in found.values()))) == list(
        range(feeding.RECORDS)
    )
    unbroken = feeding.train(kind, tmp_path / "unbroken", tmp_path / "unbroken.log")
    assert found == {step: (batch, loss) for step, batch, loss in lines(tmp_path / "unbroken.log")}
    assert_same(fc.restore_train_state(root, unbroken), unbroken)


# Saved and restored with the step.


@pytest.mark.parametrize("kind", feeding.KINDS)
def test_each_step_has_the_position_at_its_own_end(tmp_path: Path, kind: str) -> None:
    iterator: Any = feeding.KINDS[kind]()
    save(tmp_path, iterator, keep_last=None)  # the iterator goes on while a save is in flight
    for step in (1, 3):
        back: Any = feeding.KINDS[kind]()
        out = fc.restore(tmp_path, LIKE, step=step, data_iterator=back)
        assert out.state["params"]["w"][0] == step
        straight: Any = feeding.KINDS[kind]()
        for _ in range(step):
            next(straight)
        np.testing.assert_array_equal(next(back), next(straight))
        np.testing.assert_array_equal(next(back), next(straight))


def test_what_grain_prefetches_itself_is_accounted_for(tmp_path: Path) -> None:
    source = grain.MapDataset.source(np.arange(40)).shuffle(seed=1).batch(2).to_iter_dataset()
    ahead = grain.experimental.device_put(source, jax.devices()[0], device_buffer_size=4)
    iterator, back, straight = iter(ahead), iter(ahead), iter(source)
    save(tmp_path, iterator)
    fc.restore(tmp_path, LIKE, data_iterator=back)
    for _ in range(3):
        next(straight)
    assert [x.tolist() for x in back] == [x.tolist() for x in straight]
    iterator.close(), back.close()


def test_the_position_is_one_json_file_for_each_process(tmp_path: Path) -> None:
    save(tmp_path, Counter())
    assert (tmp_path / "3" / "data" / "process_0-of-1.json").read_text() == "3"
    assert [path.name for path in (tmp_path / "3" / "data").iterdir()] == ["process_0-of-1.json"]


def test_without_an_iterator_the_position_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, Counter())
    assert_same(fc.restore_train_state(tmp_path, LIKE), tree(3))
    with fc.CheckpointCallback(tmp_path) as callback:
        _, step = callback.restore_or_init(LIKE)
    assert step == 3


def test_nothing_to_restore_leaves_the_iterator_where_it_is(tmp_path: Path) -> None:
    iterator = Counter(5)
    with fc.CheckpointCallback(tmp_path, data_iterator=iterator) as callback:
        assert callback.restore_or_init(LIKE) == (LIKE, 0)
    assert iterator.n == 5


def test_an_iterator_and_no_saved_position_is_an_error_unless_the_data_begin_anew(
    tmp_path: Path,
) -> None:
    with fc.CheckpointCallback(tmp_path) as callback:
        callback.on_step_end(1, tree(1))
    iterator = Counter(5)
    with pytest.raises(CheckpointNotFoundError, match="has no position of a data iterator") as e:
        fc.restore(tmp_path, LIKE, data_iterator=iterator)
    text = "'data'; it has: params. Without it the run would begin its data anew"
    assert text in str(e.value)
    with fc.CheckpointCallback(tmp_path, data_iterator=iterator) as callback:
        with pytest.raises(CheckpointNotFoundError, match="pass restart_data=True"):
            callback.restore_or_init(LIKE)
        state, step = callback.restore_or_init(LIKE, restart_data=True)
    assert (step, iterator.n) == (1, 5)
    assert_same(state, tree(1))


def test_a_position_under_another_name_is_loaded_by_that(tmp_path: Path) -> None:
    """As MaxText and others have it, who saved with Orbax's `CheckpointManager`."""
    iterator, back = feeding.dataset(), feeding.dataset()
    next(iterator)
    with v0.CheckpointManager(tmp_path) as manager:
        parts = v0.args.Composite(
            params=v0.args.StandardSave({"w": jnp.zeros(3)}),
            iter=grain.checkpoint.CheckpointSave(iterator),
        )
        manager.save(1, args=parts)
    with pytest.raises(CheckpointNotFoundError, match="it has: iter, params.*load_checkpointables"):
        fc.restore(tmp_path, LIKE, data_iterator=back)
    fc.load_checkpointables(tmp_path / "1", {"iter": back})
    assert state_of(back) == state_of(iterator)


# What goes wrong.


def test_a_state_that_does_not_fit_leaves_the_iterator_alone(tmp_path: Path) -> None:
    save(tmp_path, Counter())
    iterator = Counter(77)
    with pytest.raises(TreeMismatchError):
        fc.restore(tmp_path, {"params": {"w": np.zeros(4)}}, data_iterator=iterator)
    assert iterator.n == 77


def test_damaged_array_data_leave_the_iterator_alone(tmp_path: Path) -> None:
    save(tmp_path, Counter())
    (data,) = (tmp_path / "3" / "params" / "d").iterdir()
    data.write_bytes(bytes(len(data.read_bytes())))
    iterator = Counter(77)
    with pytest.raises(DamagedCheckpointError):
        fc.restore(tmp_path, LIKE, step=3, data_iterator=iterator)
    assert iterator.n == 77


@pytest.mark.parametrize("kind", feeding.KINDS)
def test_a_damaged_position_is_noticed_and_the_step_before_is_taken(
    tmp_path: Path, kind: str
) -> None:
    save(tmp_path, feeding.KINDS[kind]())
    (file,) = (tmp_path / "3" / "data").iterdir()
    file.write_text(file.read_text().replace("3", "4", 1))
    iterator: Any = feeding.KINDS[kind]()
    before = state_of(iterator)
    with pytest.raises(DamagedCheckpointError, match=f"{file}: CRC-32C"):
        fc.restore(tmp_path, LIKE, step=3, data_iterator=iterator)
    assert state_of(iterator) == before
    out = fc.restore(tmp_path, LIKE, data_iterator=iterator)
    assert (out.step, out.report.damaged[0][0]) == (2, 3)
    straight: Any = feeding.KINDS[kind]()
    next(straight), next(straight)
    assert state_of(iterator) == state_of(straight)


def test_a_lost_position_is_damage(tmp_path: Path) -> None:
    save(tmp_path, Counter())
    (tmp_path / "3" / "data" / "process_0-of-1.json").unlink()
    iterator = Counter()
    with pytest.raises(DamagedCheckpointError, match="process_0-of-1.json: the file is missing"):
        fc.restore(tmp_path, LIKE, step=3, data_iterator=iterator)
    assert fc.restore(tmp_path, LIKE, data_iterator=iterator).step == 2
    assert iterator.n == 2


def test_an_iterator_that_refuses_its_position_is_named_with_the_step_and_what_is_saved(
    tmp_path: Path,
) -> None:
    class Letters(Counter):
        def __next__(self) -> Any:
            self.n = "abc"

    save(tmp_path, Letters(), 1)
    with pytest.raises(StateError) as caught:
        fc.restore(tmp_path, LIKE, data_iterator=Counter())
    assert str(caught.value) == (
        f"{tmp_path}/1: a Counter did not take the position saved there: ValueError: I count in"
        ' ints. Saved is process_0-of-1.json: "abc"'
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_position_of_another_kind_of_iterator_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "loader", feeding.loader())
    with pytest.raises(StateError, match="Iterator did not take .*KeyError: 'next_index'. Saved "):
        fc.restore(tmp_path / "loader", LIKE, data_iterator=feeding.dataset())
    save(tmp_path / "stateful", feeding.SavesItself())
    with pytest.raises(StateError, match="'left'|did not take") as caught:
        fc.restore(tmp_path / "stateful", LIKE, data_iterator=feeding.dataset())
    assert "Saved is drawing.json" in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seen": {1, 2}}, r"state of a Counter\['seen'\] is \{1, 2\}, a set; it may be of"),
        ([0, {3: "c"}], r"state of a Counter\[1\] is \{3: 'c'\}, a dict; .* with string keys"),
        ({"$bytes": "x"}, r"dicts with string keys that do not begin with '\$'"),
        (np.array([object()]), "a ndarray; it may be of"),
    ],
)
def test_a_state_that_json_cannot_hold_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    callback = fc.CheckpointCallback(tmp_path, every_n_steps=1, data_iterator=Counter(state))
    with pytest.raises(NotHandleableError, match=message):
        callback.on_step_end(1, tree(1))
    assert callback.latest_step is None


@pytest.mark.parametrize(
    "value",
    [iter([1]), [1], {"a": 1}, "text", grain.MapDataset.source([1])],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_position_is_refused_before_training(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StateError, match=f"data_iterator is a {type(value).__name__}, whose"):
        fc.CheckpointCallback(tmp_path, data_iterator=value)


def test_a_file_that_is_no_state_is_a_format_error(tmp_path: Path) -> None:
    for text in ("{", '{"$bytes": 3}', '{"$array": ["|O", [1], "AAAAAAAAAAA="]}'):
        path = tmp_path / str(len(text))
        ocp.save(path, {"w": jnp.zeros(3)})  # without a record of checksums
        (path / "data").mkdir()
        (path / "data" / "process_0-of-1.json").write_text(text)
        with pytest.raises(FormatError, match="not the state of a data iterator"):
            fc.load_checkpointables(path, {"data": Counter()})


# Handlers of users, and Orbax.


class CounterHandler:
    """A user's handler; what it loads may be a new object."""

    in_place = True

    async def save(self, directory: Any, value: Counter) -> Any:
        return self.write(directory, str(value.n))

    async def write(self, directory: Any, text: str) -> None:
        directory = await directory.await_creation()
        (directory / "n").write_text(text)

    async def load(self, directory: Any, abstract: Any = None) -> Any:
        return self.read(directory, abstract)

    async def read(self, directory: Any, target: Counter) -> Counter:
        target = target if self.in_place else Counter()
        target.n = int((directory / "n").read_text())
        return target

    async def metadata(self, directory: Any) -> None: ...

    def is_handleable(self, value: Any) -> bool:
        return isinstance(value, Counter)

    def is_abstract_handleable(self, abstract: Any) -> bool:
        return isinstance(abstract, Counter)


class NewCounterHandler(CounterHandler):
    in_place = False


def test_a_users_handler_comes_first_and_must_work_in_place(tmp_path: Path) -> None:
    for handler in (CounterHandler, NewCounterHandler):
        context = fc.Context()
        context.checkpointables.registry = fc.handlers.local_registry().add(handler)
        root = tmp_path / handler.__name__
        save(root, Counter(), context=context)
        assert (root / "3" / "data" / "n").read_text() == "3"
        iterator = Counter()
        if handler.in_place:
            fc.restore(root, LIKE, data_iterator=iterator, context=context)
            assert iterator.n == 3
        else:
            with pytest.raises(StateError, match="made a new Counter, but .* changed in place"):
                fc.restore(root, LIKE, data_iterator=iterator, context=context)


@pytest.mark.parametrize("make", [feeding.dataset, feeding.loader])
def test_orbax_reads_the_state_and_with_grain_the_position(tmp_path: Path, make: Any) -> None:
    iterator, first, second = make(), make(), make()
    save(tmp_path, iterator)
    found = ocp.load_checkpointables(tmp_path / "3", {"params": LIKE["params"], "data": first})
    np.testing.assert_array_equal(found["params"]["w"], [3, 3, 3])
    assert state_of(first) == state_of(iterator)
    with v0.CheckpointManager(tmp_path) as manager:
        manager.restore(3, args=v0.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    assert state_of(second) == state_of(iterator)


@pytest.mark.parametrize("kind", ["plain", "stateful"])
def test_orbax_reads_the_rest_of_a_step(tmp_path: Path, kind: str) -> None:
    save(tmp_path, feeding.KINDS[kind]())
    found = ocp.load_checkpointables(tmp_path / "3", LIKE)
    np.testing.assert_array_equal(found["params"]["w"], [3, 3, 3])


# Several processes.

SHARED = """
    sys.path.insert(0, {root!r})
    from tests.training.test_data import Counter, LIKE, save, tree
    import grain

    def dataset():
        options = grain.sharding.ShardByJaxProcess()
        source = grain.MapDataset.source(np.arange(40))[options.shard_index::options.shard_count]
        return iter(source.shuffle(seed=0).batch(2).to_iter_dataset())

    for name, make in (("counter", lambda: Counter(100 * index)), ("dataset", dataset)):
        save(path + "/" + name, make(), context=context)
        iterator, straight = make(), make()
        fc.restore(path + "/" + name, LIKE, data_iterator=iterator, context=context)
        [next(straight) for _ in range(3)]
        print(name, np.array_equal(next(iterator), next(straight)), flush=True)
    try:
        fc.restore(path + "/one", LIKE, data_iterator=Counter(), context=context)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_each_process_has_a_position_of_its_own_and_another_number_of_them_is_named(
    tmp_path: Path,
) -> None:
    save(tmp_path / "one", Counter())
    for outcome in run_two(SHARED.format(root=str(ROOT)), tmp_path):
        assert outcome.out.splitlines()[:2] == ["counter True", "dataset True"], outcome.err[-3000:]
        message = f"StateError {tmp_path}/one/3/data has the positions of 1 process(es), and this"
        assert outcome.out.splitlines()[2].startswith(f"{message} run has 2: ")
    files = sorted(path.name for path in (tmp_path / "counter" / "3" / "data").iterdir())
    assert files == ["process_0-of-2.json", "process_1-of-2.json"]

    iterator: Any
    for name, iterator in (("counter", Counter(7)), ("dataset", feeding.dataset())):
        before = state_of(iterator)
        with fc.CheckpointCallback(tmp_path / name, data_iterator=iterator) as callback:
            with pytest.raises(StateError, match=r"of 2 process\(es\), and this run has 1: .*anew"):
                callback.restore_or_init(LIKE)
            assert state_of(iterator) == before
            assert callback.restore_or_init(LIKE, restart_data=True)[1] == 3
        assert state_of(iterator) == before
