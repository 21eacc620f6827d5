"""When to save and what to keep, with a clock that the test holds."""

import pytest
from flax_ckpt.training.policies import Schedule, to_delete


def due(
    schedule: Schedule,
    step: int,
    now: float = 0.0,
    last_step: int | None = None,
    last_time: float = 0.0,
) -> bool:
    return schedule.due(step, now=now, last_step=last_step, last_time=last_time)


def test_every_n_steps_saves_at_multiples_and_not_twice():
    schedule = Schedule(every_n_steps=3)
    assert [s for s in range(1, 10) if due(schedule, s)] == [3, 6, 9]
    assert not due(schedule, 6, last_step=6)


def test_every_secs_counts_from_the_last_save():
    schedule = Schedule(every_secs=10.0)
    assert not due(schedule, 5, now=109.9, last_time=100.0)
    assert due(schedule, 5, now=110.0, last_time=100.0)
    assert not due(schedule, 5, now=200.0, last_step=5, last_time=100.0)


def test_what_comes_first_is_enough():
    schedule = Schedule(every_n_steps=100, every_secs=10.0)
    assert due(schedule, 100)
    assert due(schedule, 7, now=11.0)
    assert not due(schedule, 7, now=9.0)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_period_that_is_not_positive_is_refused(wrong: int):
    with pytest.raises(ValueError, match=f"every_n_steps must be at least 1, got {wrong}"):
        Schedule(every_n_steps=wrong)
    with pytest.raises(ValueError, match=f"every_secs must be positive, got {wrong}"):
        Schedule(every_secs=wrong)


def test_keep_last_never_deletes_the_latest():
    assert to_delete([1, 2, 3], keep_last=None) == []
    assert to_delete([1, 2, 3], keep_last=5) == []
    assert to_delete([1, 2, 3], keep_last=1) == [1, 2]
    assert to_delete([1, 2, 3], keep_last=0) == [1, 2]
    assert to_delete([], keep_last=1) == []
