"""What to keep: each policy against Orbax's own of the same name, and where ours differ."""

import datetime
import inspect
import math
from types import SimpleNamespace
from typing import Any

import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_ckpt as fc

ours = fc.training.preservation_policies
theirs = ocp.training.preservation_policies
NAMES = [
    "AnyPreservationPolicy",
    "BestN",
    "CustomSteps",
    "EveryNSeconds",
    "EveryNSteps",
    "EveryNStepsClosest",
    "LatestDuration",
    "LatestN",
    "PreservationContext",
    "PreservationPolicy",
    "PreserveAll",
]


def loss(metrics: Any) -> float:
    return metrics["loss"]


def policies(module: Any) -> list[Any]:
    """The same policies from either library."""
    some = [
        module.PreserveAll(),
        *(module.LatestN(n) for n in (None, 0, 1, 3)),
        module.LatestDuration(datetime.timedelta(seconds=15)),
        module.EveryNSeconds(10),
        *(module.EveryNSteps(3, exact, most) for exact in (True, False) for most in (None, 1, 2)),
        *(module.EveryNStepsClosest(4, most) for most in (None, 2)),
        module.CustomSteps([2, 5, 7]),
        *(
            module.BestN(get_metric_fn=loss, reverse=r, n=n, keep_checkpoints_without_metrics=k)
            for r in (False, True)
            for n in (None, 0, 1, 2)
            for k in (False, True)
        ),
    ]
    return [*some, module.AnyPreservationPolicy([some[2], some[6], some[-1]])]


def kept(policy: Any, history: list[Any]) -> list[int]:
    flags = policy.should_preserve(history, context=ours.PreservationContext())
    return [c.step for c, flag in zip(history, flags, strict=True) if flag]


def checkpoints(*losses: float | None) -> list[Any]:
    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return [
        SimpleNamespace(step=i, time=at, metrics=None if x is None else {"loss": x})
        for i, x in enumerate(losses)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4), st.integers(0, 12), st.none() | st.sampled_from([0.5, 1.0, 2.0])
        ),
        max_size=8,
    )
)
def test_they_keep_as_those_of_orbax(gaps: list[tuple[int, int, float | None]]):
    # `LatestDuration` of Orbax reads the clock: the history ends now, away from the limits.
    ago = sum(seconds for _, seconds, _ in gaps)
    time = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)
    history, step = [], 0
    for more, seconds, value in gaps:
        step, time = step + more, time + datetime.timedelta(seconds=seconds)
        metrics = None if value is None else {"loss": value}
        history.append(SimpleNamespace(step=step, time=time, metrics=metrics))
    edge = datetime.timedelta(seconds=15)
    at_the_limit = any(history[-1].time - c.time == edge for c in history)
    for a, b in zip(policies(ours), policies(theirs), strict=True):
        if not (isinstance(a, ours.LatestDuration) and at_the_limit):
            assert kept(a, history) == kept(b, history), a


@pytest.mark.parametrize("name", NAMES)
def test_names_and_parameters_are_those_of_orbax(name: str):
    a, b = (getattr(module, name) for module in (ours, theirs))
    fields = [
        [(p.name, p.kind, p.default) for p in inspect.signature(c).parameters.values()]
        for c in (a, b)
    ]
    if name == "PreservationPolicy":
        fields = [[], []]
    assert fields[0] == fields[1]


def test_a_loss_that_is_not_a_number_is_never_best():
    history = checkpoints(math.nan, 0.5, math.nan, 0.7, math.nan)
    for reverse, best in ((True, [1]), (False, [3])):
        assert kept(ours.BestN(get_metric_fn=loss, reverse=reverse, n=1), history) == best
        assert kept(ours.BestN(get_metric_fn=loss, reverse=reverse, n=2), history) == [1, 3]


def test_of_equal_losses_the_later_is_kept():
    for reverse in (True, False):
        policy = ours.BestN(get_metric_fn=loss, reverse=reverse, n=2)
        assert kept(policy, checkpoints(1.0, 1.0, 1.0)) == [1, 2]


def test_steps_without_metrics_are_kept_besides_or_not():
    history = checkpoints(None, 1.0, 2.0, None)
    best = ours.BestN(get_metric_fn=loss, n=1)
    assert kept(best, history) == [0, 2, 3]
    best.keep_checkpoints_without_metrics = False
    assert kept(best, history) == [2]


def test_latest_duration_counts_from_the_latest_step_and_reads_no_clock():
    day = datetime.timedelta(days=1)
    history = [SimpleNamespace(step=i, time=datetime.datetime.min + i * day) for i in range(4)]
    assert kept(ours.LatestDuration(1.5 * day), history) == [2, 3]


def test_none_of_no_policies_keeps_anything():
    assert kept(ours.AnyPreservationPolicy([]), checkpoints(1.0, 2.0)) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.LatestN(-1), "n must be at least 0, got -1"),
        (lambda: ours.BestN(get_metric_fn=loss, n=-1), "n must be at least 0, got -1"),
        (lambda: ours.EveryNSteps(0), "interval_steps must be at least 1, got 0"),
        (lambda: ours.EveryNStepsClosest(0), "interval_steps must be at least 1, got 0"),
        (lambda: ours.EveryNSteps(1, max_to_keep=0), "max_to_keep must be at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_at_once(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policy", policies(ours), ids=lambda policy: type(policy).__name__)
def test_they_follow_the_protocol(policy: Any):
    assert isinstance(policy, ours.PreservationPolicy)
    assert isinstance(policy, theirs.PreservationPolicy)
