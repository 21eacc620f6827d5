"""When to save and what to keep, with a clock that the test holds."""

import pytest

from flax_ckpt.training.policies import EveryNSteps, EverySecs, Moment, should_save, to_delete


def moment(step: int, now: float = 0.0, last_step: int | None = None, last_time: float = 0.0):
    return Moment(step, now, last_step, last_time)


def test_every_n_steps_saves_at_multiples_and_not_twice():
    policy = EveryNSteps(3)
    assert [s for s in range(1, 10) if policy.should_save(moment(s))] == [3, 6, 9]
    assert not policy.should_save(moment(6, last_step=6))


def test_every_secs_counts_from_the_last_save():
    policy = EverySecs(10.0)
    assert not policy.should_save(moment(5, now=109.9, last_time=100.0))
    assert policy.should_save(moment(5, now=110.0, last_time=100.0))
    assert not policy.should_save(moment(5, now=200.0, last_step=5, last_time=100.0))


def test_any_policy_is_enough():
    policies = [EveryNSteps(100), EverySecs(10.0)]
    assert should_save(policies, moment(100))
    assert should_save(policies, moment(7, now=11.0))
    assert not should_save(policies, moment(7, now=9.0))


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_policy_refuses_a_period_that_is_not_positive(wrong: int):
    with pytest.raises(ValueError, match=f"every_n_steps must be at least 1, got {wrong}"):
        EveryNSteps(wrong)
    with pytest.raises(ValueError, match=f"every_secs must be positive, got {wrong}"):
        EverySecs(wrong)


def test_keep_last_never_deletes_the_latest():
    assert to_delete([1, 2, 3], keep_last=None) == []
    assert to_delete([1, 2, 3], keep_last=5) == []
    assert to_delete([1, 2, 3], keep_last=1) == [1, 2]
    assert to_delete([1, 2, 3], keep_last=0) == [1, 2]
    assert to_delete([], keep_last=1) == []
