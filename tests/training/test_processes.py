"""Two processes of one run: what depends on a clock or a signal is decided once, for both."""

from pathlib import Path

import flax_ckpt as fc
from tests.storage.test_processes import run_two

CHECKPOINTER = """
    import datetime
    policies, keep = fc.training.save_decision_policies, fc.training.preservation_policies

    class OfThisProcess:
        "Says what no other process would say by itself."
        def should_save(self, step, previous_steps, *, context):
            return step.step % 2 == index

    with fc.training.Checkpointer(
        path, context=context, save_decision_policy=OfThisProcess(),
        preservation_policy=keep.LatestN(2), custom_metadata={"run": 1},
    ) as checkpointer:
        values = {s: {"a": place(np.full(4, s), P("x"))} for s in range(1, 7)}
        print([s for s, tree in values.items() if checkpointer.save(s, tree)], flush=True)
        assert checkpointer.root_metadata().custom_metadata == {"run": 1}
        for shard in checkpointer.load(6)["a"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.full(2, 6))
        checkpointer.delete(4)
        print([c.step for c in checkpointer.checkpoints], flush=True)
    with fc.training.Checkpointer(path, context=context) as checkpointer:
        print(bool(checkpointer.save(8, {"a": place(np.ones(4), P("x"))})), flush=True)
"""

CALLBACK = """
    def run(first, last, **options):
        with fc.CheckpointCallback(path, context=context, **options) as ckpt:
            state = {"params": place(np.zeros(4), P("x"))}
            _, step = ckpt.restore_or_init(state)
            found = [s for s in range(first, last) if ckpt.on_step_end(s, state)]
            print(step, found, flush=True)

    # Times that differ between the processes: only that of the primary counts.
    run(1, 4, every_n_steps=1, keep_last=None)
    run(4, 7, every_secs=[1e-9, 1e9][index], keep_last=None)
    run(7, 9, every_secs=[1e9, 1e-9][index], at_end=False)
    fresh = fc.CheckpointCallback(path, context=context, every_n_steps=1, at_end=False)
    fresh.on_step_end(2, {"params": place(np.zeros(4), P("x"))})  # step 3 and later are put aside
    fresh.close()
    print(fresh.latest_step, flush=True)
"""


def test_the_primary_decides_for_all(tmp_path: Path):
    for outcome in run_two(CHECKPOINTER, tmp_path / "run", 20):
        assert outcome.out.splitlines() == ["[2, 4, 6]", "[6]", "True"], outcome.err[-3000:]
    assert [c.step for c in fc.training.Checkpointer(tmp_path / "run").checkpoints] == [6, 8]


def test_a_callback_may_save_by_the_clock(tmp_path: Path):
    for outcome in run_two(CALLBACK, tmp_path / "run", 20):
        assert outcome.out.splitlines() == [
            "0 [1, 2, 3]",
            "3 [4, 5, 6]",
            "6 []",
            "2",
        ], outcome.err[-3000:]


def test_a_primary_that_is_gone_is_named(tmp_path: Path):
    program = """
        from jax._src import distributed
        client = distributed.global_state.client

        class Stops:
            def should_save(self, step, previous_steps, *, context):
                raise ZeroDivisionError

        checkpointer = fc.training.Checkpointer(
            path, context=context, save_decision_policy=Stops())
        try:
            checkpointer.save(1, {"a": 1})
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[:1], flush=True)
        if index == 1:
            client.key_value_set("told", "")
        client.blocking_key_value_get("told", 60_000)  # without the first, the other is ended
        leave()
    """
    first, second = run_two(program, tmp_path / "run", 3)
    assert first.out.startswith("ZeroDivisionError"), first.err[-3000:]
    assert second.out.startswith("BarrierTimeoutError"), second.err[-3000:]
    assert "process 1 waited for process 0 to say" in second.out


def test_a_preemption_saves_at_one_step_in_all(tmp_path: Path):
    program = """
        policies = fc.training.save_decision_policies
        with fc.training.Checkpointer(
            path, context=context, save_decision_policy=policies.PreemptionCheckpointingPolicy(),
        ) as checkpointer:
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for step in range(1, 1_000_000):
                if checkpointer.save(step, {"a": place(np.ones(4), P("x"))}):
                    break
            assert checkpointer.latest.step == step
            print("saved", step, flush=True)
    """
    first, second = run_two(program, tmp_path / "run", 20)
    assert first.out.startswith("saved "), first.err[-3000:]
    assert first.out == second.out, second.err[-3000:]


def test_a_callback_leaves_at_one_step_in_all(tmp_path: Path):
    program = """
        from flax_ckpt.errors import Preempted
        try:
            with fc.CheckpointCallback(path, context=context, every_n_steps=1_000_000) as ckpt:
                state = {"params": place(np.ones(4), P("x"))}
                ckpt.restore_or_init(state)
                if index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                for step in range(1, 1_000_000):
                    ckpt.on_step_end(step, state)
        except Preempted as left:
            print("left", left.code, left.step == ckpt.latest_step, left.step, flush=True)
    """
    first, second = run_two(program, tmp_path / "run", 20)
    assert first.out.startswith("left 143 True "), first.err[-3000:]
    assert first.out == second.out, second.err[-3000:]


def test_steps_are_moved_aside_when_nobody_restores_them_any_more(tmp_path: Path):
    program = """
        from jax._src import distributed
        client = distributed.global_state.client
        state = lambda value: {"params": place(np.full(4, float(value)), P("x"))}
        options = {"context": context, "every_n_steps": 1, "keep_last": None, "at_end": False}
        with fc.CheckpointCallback(path, **options) as ckpt:
            for step in range(1, 4):
                ckpt.on_step_end(step, state(step))
        if index == 1:  # comes late to its restore: the other one waits
            client.blocking_key_value_get("restoring", 60_000)
        else:
            client.key_value_set("restoring", "")
        with fc.CheckpointCallback(path, **options) as ckpt:
            print(ckpt.restore_or_init(state(0))[1], flush=True)
        with fc.CheckpointCallback(path, **options) as ckpt:
            ckpt.on_step_end(2, state(2))
            print(ckpt.restore_or_init(state(0), step=1)[1], flush=True)
            ckpt.on_step_end(2, state(-2))
        restored = fc.restore(path, state(0), context=context).state["params"]
        print(ckpt.latest_step, restored.addressable_shards[0].data[0], flush=True)
    """
    for outcome in run_two(program, tmp_path / "run", 20):
        assert outcome.out.splitlines() == ["3", "1", "2 -2.0"], outcome.err[-3000:]
